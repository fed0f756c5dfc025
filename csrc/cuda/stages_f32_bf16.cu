#include "cuda/stages.cuh"

FFKERNELS_STAGES(f32_bf16)
