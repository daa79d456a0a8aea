"""Selection of the environment variables that are passed to the ranks on all hosts: an explicit list without secrets."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ldmole_dist.errors import UserError

# Variables that are passed on unless their name matches _SECRET; a trailing * matches any suffix.
PASSED_ON = (
    *("PYTHONPATH", "LD_LIBRARY_PATH", "CUDA_HOME", "TORCH_EXTENSIONS_DIR", "DS_ACCELERATOR"),
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TOKENIZERS_PARALLELISM"),
    *("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_DATASETS_CACHE", "HF_ENDPOINT", "TRANSFORMERS_OFFLINE"),
    *("CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TORCH_DISTRIBUTED_DEBUG"),
    *("NCCL_*", "TORCH_NCCL_*", "GLOO_*", "UCX_*", "FI_*"),
)
_SECRET = re.compile(r"TOKEN(?!IZERS)|SECRET|PASSW|CREDENTIAL|API_?KEY|PRIVATE", re.IGNORECASE)


def exported_environment(environ: Mapping[str, str], requested: Sequence[str], interface: str | None) -> dict[str, str]:
    """Return the environment variables to pass to the ranks: those of `environ` that PASSED_ON lists, and the requested ones.

    Args:
        environ: environment of this process.
        requested: values of --export: "NAME" (with its value in `environ`) or "NAME=VALUE".
        interface: value of --interface; None if it is not set. If it is set, variables *_SOCKET_IFNAME are dropped, because
            they may name another interface.

    Raises:
        UserError: if a variable that is requested without a value is not set, or if the name of a requested variable looks like
            that of a secret. The variables are passed on command lines, which every user of a host can read.
    """
    exports = {name: value for name, value in environ.items() if any(_matches(name, pattern) for pattern in PASSED_ON)}
    for text in requested:
        name, given, value = text.partition("=")
        if not given and name not in environ:
            raise UserError(f"--export {name}: the variable is not set; set it, or pass --export {name}=VALUE")
        if _SECRET.search(name):
            raise UserError(
                f"--export {name}: the name looks like that of a secret, and exported values are visible in the process lists "
                "of all hosts; set the variable on each host instead (for the Hugging Face Hub: log in there, or download the "
                "models beforehand)"
            )
        exports[name] = value if given else environ[name]
    exports = {name: value for name, value in exports.items() if not _SECRET.search(name)}
    if interface is not None:
        exports = {name: value for name, value in exports.items() if not name.endswith("_SOCKET_IFNAME")}
    return exports


def _matches(name: str, pattern: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern
