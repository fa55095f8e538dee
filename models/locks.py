"""The lock of what PyTorch keeps for all threads of a process."""

import threading

# One thread at a time traces or counts: all calls of modules go through the tracer of torch.fx, and dispatch
# modes set flags of the process.
TRACING = threading.RLock()
