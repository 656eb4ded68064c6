"""Files and folders written whole or not at all, memory, processes, progress: what the rest asks of the machine."""
