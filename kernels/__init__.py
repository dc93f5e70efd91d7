"""Low-bit attention kernels: formats, the table of variants, quantisers and attention (NumPy and Triton)."""
if __name__ == "kernels":
    raise ImportError("the folder 'kernels' is the package lowbit_video.kernels: install the project (pip install -e .) "
                      "and import lowbit_video.kernels")
