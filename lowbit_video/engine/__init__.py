"""From a checked call to launches: options, selection, the CPU and the GPU engine, replay."""
