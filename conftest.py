"""Settings for pytest. The kernels that run the notebooks inherit the environment."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave the core to others
os.environ["PYTHONUTF8"] = "1"  # text is UTF-8 whatever the system's language is
os.environ["TQDM_DISABLE"] = "1"


def pytest_collectstart(collector):
    """Let nbval compare no warnings: they differ between versions of the libraries."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr",)
