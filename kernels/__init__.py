"""Low-bit attention kernels: formats, the table of variants, quantisers and attention (NumPy and Triton)."""
if __name__ == "kernels":
    # transformers imports a package of this name where it finds one, so the import itself must pass; nothing else does.
    __path__ = []

    def __getattr__(name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError("the folder 'kernels' is the package lowbit_video.kernels: install the project (pip install -e .) "
                          "and import lowbit_video.kernels")
