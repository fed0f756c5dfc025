#include "cuda/stages.cuh"

FFKERNELS_STAGES(bf16)
