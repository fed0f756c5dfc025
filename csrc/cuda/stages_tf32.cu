#include "cuda/stages.cuh"

FFKERNELS_STAGES(tf32)
