"""The Triton backend: kernels for every GPU that Triton compiles for. Importing this package imports no triton."""
