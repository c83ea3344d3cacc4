"""The Triton kernels. Importing anything here but `tiles` imports Triton."""
