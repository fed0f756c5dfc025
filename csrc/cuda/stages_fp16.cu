#include "cuda/stages.cuh"

FFKERNELS_STAGES(fp16)
