"""placeholder"""
from peft import PeftModel
def enable_gradient_checkpointing(model: PeftModel) -> None:
    context = model.base_model.context
    model.get_base_model().activation_checkpointing_enable(
        activation_checkpointing_kwargs={"use_reentrant": False, "context_fn": context.checkpoint_contexts}
    )
