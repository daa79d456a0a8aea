"""The keys of a DeepSpeed config that this package accepts, with their types and ranges, and the keys that it rejects.

All are keys of DeepSpeed 0.19.8. They are checked here so that `ldmole validate` needs neither DeepSpeed nor torch, whose
import takes seconds. A test compares this file with DeepSpeed's own config classes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, with_config
from typing_extensions import TypedDict

_FORBID = ConfigDict(extra="forbid")
_Count = Annotated[int, Field(ge=0)]
_Positive = Annotated[int, Field(ge=1)]
_StrictPositive = Annotated[int, Field(ge=1, strict=True)]
_Fraction = Annotated[float, Field(ge=0, le=1)]
_CommunicationDtype = Literal["fp16", "bf16", "fp32"]


@with_config(_FORBID)
class OffloadOptimizer(TypedDict, total=False):
    """Section zero_optimization.offload_optimizer."""

    device: Literal["none", "cpu", "nvme"]
    nvme_path: str | None
    buffer_count: _Count
    pin_memory: bool
    pipeline_read: bool
    pipeline_write: bool
    fast_init: bool
    ratio: _Fraction
    cpuadam_cores_perc: _Fraction


@with_config(_FORBID)
class OffloadParam(TypedDict, total=False):
    """Section zero_optimization.offload_param."""

    device: Literal["none", "cpu", "nvme"]
    nvme_path: str | None
    buffer_count: _Count
    buffer_size: _Count
    max_in_cpu: _Count
    pin_memory: bool


@with_config(_FORBID)
class ZeroOptimization(TypedDict, total=False):
    """Section zero_optimization."""

    stage: Literal[0, 1, 2, 3]
    contiguous_gradients: bool
    reduce_scatter: bool
    reduce_bucket_size: _Positive
    use_multi_rank_bucket_allreduce: bool
    allgather_partitions: bool
    allgather_bucket_size: _Count
    overlap_comm: bool | None
    compute_grad_norm: bool
    offload_param: OffloadParam | None
    offload_optimizer: OffloadOptimizer | None
    sub_group_size: _Count
    stage3_prefetch_bucket_size: _Count
    stage3_param_persistence_threshold: _Count
    stage3_model_persistence_threshold: _Count
    stage3_max_live_parameters: _Count
    stage3_max_reuse_distance: _Count
    stage3_module_granularity_threshold: int
    stage3_use_all_reduce_for_fetch_params: bool
    stage3_allgather_sequential: bool
    ignore_unused_parameters: bool
    round_robin_gradients: bool
    parameter_alignment: bool
    zero_hpz_partition_size: _Count
    zero_quantized_weights: bool
    zero_quantized_nontrainable_weights: bool
    zero_quantized_gradients: bool
    memory_efficient_linear: bool
    override_module_apply: bool
    log_trace_cache_warnings: bool
    enable_sanity_checks: bool


@with_config(_FORBID)
class BF16(TypedDict, total=False):
    """Section bf16."""

    enabled: bool
    immediate_grad_update: bool
    check_grad_overflow: bool


@with_config(_FORBID)
class FP16(TypedDict, total=False):
    """Section fp16. A `loss_scale` of 0 adapts the loss scale during training.

    Numbers are validated strictly, because DeepSpeed rejects booleans here.
    """

    enabled: bool
    loss_scale: Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]
    initial_scale_power: Annotated[int, Field(ge=0, strict=True)]
    loss_scale_window: _StrictPositive
    hysteresis: _StrictPositive
    consecutive_hysteresis: bool
    min_loss_scale: _StrictPositive


@with_config(_FORBID)
class DeepSpeedFile(TypedDict, total=False):
    """A DeepSpeed config file. Sections for logging and profiling are checked by DeepSpeed itself."""

    train_batch_size: _Positive
    train_micro_batch_size_per_gpu: _Positive
    gradient_accumulation_steps: _Positive
    gradient_clipping: Annotated[float, Field(ge=0)]
    zero_optimization: ZeroOptimization
    zero_allow_untested_optimizer: bool
    zero_force_ds_cpu_optimizer: bool
    bf16: BF16
    fp16: FP16
    communication_data_type: _CommunicationDtype | None
    prescale_gradients: bool
    gradient_predivide_factor: Annotated[float, Field(gt=0)]
    disable_allgather: bool
    disable_python_gc: bool
    steps_per_print: int | None
    dump_state: bool
    wall_clock_breakdown: bool
    memory_breakdown: bool
    log_level: str
    comms_logger: dict[str, Any]
    flops_profiler: dict[str, Any]
    timers: dict[str, Any]
    tensorboard: dict[str, Any]
    csv_monitor: dict[str, Any]
    wandb: dict[str, Any]
    comet: dict[str, Any]


DEEPSPEED_FILE = TypeAdapter(DeepSpeedFile)

# Keys of DeepSpeed that contradict the run config, are not supported or have no effect, each with the reason and the remedy.
REFUSED = {
    "optimizer": "the run config decides the optimizer; remove this section and set optimisation.optimizer",
    "scheduler": "the run config decides the schedule; remove this section and set optimisation.schedule",
    "elasticity": "the run config decides the batch sizes; remove this section",
    "torch_autocast": "the run config decides the precision; remove this section and set parallelism.precision",
    "activation_checkpointing": "it has no effect on transformers models; remove it and set parallelism.gradient_checkpointing",
    "aio": "it is for offloading to NVMe, which checkpoints do not support; remove this section",
    "autotuning": "remove this section and choose a config with `ldmole plan`",
    "checkpoint": "checkpoints are written by this package; remove this section",
    "compile": "compiled engines are not supported; remove this section",
    "data_efficiency": "the run config decides the data; remove this section",
    "data_types": "adapter gradients are float32; remove this section",
    "dataloader_drop_last": "the run config decides the data; remove this key",
    "datastates_ckpt": "checkpoints are written by this package; remove this section",
    "expert_parallel": "it is for DeepSpeed's own MoE layers; remove it and set parallelism.ep_size",
    "gradient_allreduce_op": "gradients are averaged over ranks; remove this key",
    "hybrid_engine": "it is for RLHF with DeepSpeed's inference kernels; remove this section",
    "managed_gradient_accumulation": "this package counts the micro-batches; remove this key",
    "pipeline": "pipeline parallelism is not supported; remove this section",
    "seq_parallel_communication_data_type": "sequence parallelism is not supported; remove this key",
    "sequence_parallel_size": "sequence parallelism is not supported; remove this key",
    "tensor_parallel": "tensor parallelism is not supported; remove this section",
    "use_data_before_expert_parallelism": "consecutive ranks form an expert-parallel group; remove this key",
    "weight_quantization": "DeepSpeed's weight quantization is not supported; remove this section",
    "zero_optimization.cpu_offload": 'it is deprecated; replace it with "offload_optimizer": {"device": "cpu"}',
    "zero_optimization.cpu_offload_param": 'it is deprecated; replace it with "offload_param": {"device": "cpu"}',
    "zero_optimization.cpu_offload_use_pin_memory": "it is deprecated; replace it with pin_memory in the offload sections",
    "zero_optimization.elastic_checkpoint": "checkpoints are written by this package; remove this key",
    "zero_optimization.legacy_stage1": "DeepSpeed does not support it any more; remove this key",
    "zero_optimization.load_from_fp32_weights": "checkpoints are read by this package; remove this key",
    "zero_optimization.pipeline_loading_checkpoint": "checkpoints are read by this package; remove this key",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "only the adapter is saved; remove this key",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "only the adapter is saved; remove this key",
    "zero_optimization.save_muon_momentum_buffer_in_memory": "the optimizer is AdamW; remove this key",
    "zero_optimization.leaf_module": "adapters must be fetched layer by layer; remove this section",
    "zero_optimization.zenflow": "its optimizer state is not in checkpoints; remove this section",
    "zero_optimization.mics_shard_size": "sharded checkpoints do not support it; remove this key",
    "zero_optimization.mics_hierarchical_params_gather": "DeepSpeed does not support it any more; remove this key",
    "zero_optimization.zeropp_loco_param": "DeepSpeed does not support it any more; remove this key",
    "zero_optimization.offload_optimizer.super_offload": "its optimizer state is not in checkpoints; remove this key",
    "bf16.bf16_master_weights_and_grads": "adapter parameters are float32; remove this key",
    "bf16.bf16_optimizer_states": "adapter parameters are float32; remove this key",
    "fp16.auto_cast": "parallelism.precision=fp16 sets the dtype of the backbone; remove this key",
    "fp16.fp16_master_weights_and_grads": "adapter parameters are float32; remove this key",
}
