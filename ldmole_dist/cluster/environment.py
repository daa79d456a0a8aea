"""Which environment variables go along to the ranks on other hosts: an explicit list, and no secrets."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ldmole_dist.errors import UserError

# A * stands for any ending.
NAMES = (
    *("PYTHONPATH", "LD_LIBRARY_PATH", "CUDA_HOME", "TORCH_EXTENSIONS_DIR", "DS_ACCELERATOR"),
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TOKENIZERS_PARALLELISM"),
    *("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_DATASETS_CACHE", "HF_ENDPOINT", "TRANSFORMERS_OFFLINE"),
    *("CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TORCH_DISTRIBUTED_DEBUG"),
    *("NCCL_*", "TORCH_NCCL_*", "GLOO_*", "UCX_*", "FI_*"),
)
_SECRET = re.compile(r"TOKEN(?!IZERS)|SECRET|PASSW|CREDENTIAL|API_?KEY|PRIVATE", re.IGNORECASE)


def exported(environ: Mapping[str, str], asked: Sequence[str], interface: str | None) -> dict[str, str]:
    """The variables for ranks.

    Args:
        environ: of this process.
        asked: further ones, "NAME" (as it is here) or "NAME=VALUE".
        interface: if given, it decides, not what the environment says of interfaces.

    Raises:
        UserError: for one that is not set, or named like a secret: every user of a host can read command lines.
    """
    found = {name: value for name, value in environ.items() if any(_matches(name, known) for known in NAMES)}
    for text in asked:
        name, given, value = text.partition("=")
        if not given and name not in environ:
            raise UserError(f"--export {name}: it is not set here; set it, or give --export {name}=VALUE")
        if _SECRET.search(name):
            raise UserError(
                f"--export {name}: would show in the process lists of all hosts; have it set on each host instead "
                "(for the Hugging Face hub: log in there, or load models beforehand)"
            )
        found[name] = value if given else environ[name]
    found = {name: value for name, value in found.items() if not _SECRET.search(name)}
    if interface is not None:
        found = {name: value for name, value in found.items() if not name.endswith("_SOCKET_IFNAME")}
    return found


def _matches(name: str, known: str) -> bool:
    return name.startswith(known[:-1]) if known.endswith("*") else name == known
