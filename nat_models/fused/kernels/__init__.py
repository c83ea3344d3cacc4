"""The Triton kernels. Importing anything here imports Triton."""
