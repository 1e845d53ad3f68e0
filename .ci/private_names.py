"""Check that every private name of another library that the package touches stands in the table below.

A private name may go or change its meaning in any release. Each entry says what it is touched for and which test breaks
first when it does. A use that is not here fails the check, and so does an entry that nothing uses.
"""

# ruff: noqa: E501
from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

LIBRARIES = {"torch", "transformers", "accelerate", "datasets", "peft", "trl"}
_KERNELS, _RANDOM, _COMPILED = (
    "tests/attention/test_kernels.py",
    "tests/hf/test_randomness.py",
    "tests/hf/test_compilation.py",
)
# name: what for, and the test that breaks first
# fmt: off
PRIVATE: dict[str, tuple[str, str]] = {
    # torch: attention
    "_scaled_dot_product_flash_attention_for_cpu": (
        "the CPU kernel that returns what its backward needs", f"{_KERNELS}::test_chunks_equal_the_dense_definition"),
    "_scaled_dot_product_flash_attention_for_cpu_backward": (
        "its backward, for one query block", f"{_KERNELS}::test_chunks_equal_the_dense_definition"),
    # torch: compilation
    "_dynamo": ("reads and raises recompile_limit", f"{_COMPILED}::test_no_length_is_left_uncompiled_where_each_is_compiled_by_itself"),
    "torch._dynamo.exc.FailOnRecompileLimitHit": (
        "turned into an error that says what to do", "tests/attention/test_recompiles.py::test_the_recompile_limit_raises_instead_of_turning_dense"),
    "torch._dynamo.eval_frame.OptimizedModule": ("a compiled model is refused", "tests/dropin/test_share.py::test_a_compiled_model"),
    "torch.fx.experimental._config": (
        "no two sizes are taken for one", f"{_COMPILED}::test_one_dynamic_layer_serves_lengths_whose_tiles_once_equalled_the_heads"),
    "_compiled_call_impl": ("a layer's compiled call gets its self-test", f"{_COMPILED}::test_compiled_layers_are_compared_once_before_they_first_run"),
    "_call_impl": ("the same layer, uncompiled", f"{_COMPILED}::test_compiled_layers_are_compared_once_before_they_first_run"),
    "_orig_mod": ("the model inside of a compiled one", "tests/dropin/test_share.py::test_stats_and_unshare_reach_through_wrappers"),
    # torch: autograd and modules
    "_C": ("where _current_graph_task_id is", "tests/hf/test_threads.py::test_what_is_run_again_in_another_thread_has_the_settings_of_the_first_run"),
    "_current_graph_task_id": (
        "whether a checkpoint runs a layer again", "tests/hf/test_threads.py::test_what_is_run_again_in_another_thread_has_the_settings_of_the_first_run"),
    "torch.utils._python_dispatch.TorchDispatchMode": ("sees every operator", f"{_RANDOM}::test_any_source_is_found_and_set_to_zero"),
    "torch.nn.modules.dropout._DropoutNd": ("every dropout module there is", f"{_RANDOM}::test_any_source_is_found_and_set_to_zero"),
    "_buffers": ("buffers that a forward replaces are put back", f"{_RANDOM}::test_asking_leaves_everything_as_it_was"),
    "_modules": ("buffers of large models are looked through", "tests/hf/test_row_dependence.py::test_statistics_of_the_batch_are_refused"),
    "_version": ("buffers that a forward writes to are put back", f"{_RANDOM}::test_asking_leaves_everything_as_it_was"),
    "_forward_hooks": ("a model with other hooks is asked again", "tests/hf/test_randomness.py::test_the_drop_in_asks_again_when_something_changes"),
    "_forward_pre_hooks": ("as _forward_hooks", "tests/hf/test_randomness.py::test_the_drop_in_asks_again_when_something_changes"),
    "_is_replica": ("nn.DataParallel is refused", "tests/hf/test_refusals.py::test_data_parallel"),
    "torch.utils._pytree.tree_leaves": ("counts the bytes of an operator", "tests/bench/test_lm_head.py::test_counting_by_hand"),
    "torch.utils._pytree.tree_flatten": ("looks for tensors among arguments", "tests/training/test_memory.py::test_what_a_model_keeps_that_is_trained_in_part"),
    "torch.utils._pytree.tree_map": ("as tree_flatten", "tests/training/test_memory.py::test_what_a_model_keeps_that_is_trained_in_part"),
    "torch.utils._pytree.tree_unflatten": ("as tree_flatten", "tests/training/test_memory.py::test_what_a_model_keeps_that_is_trained_in_part"),
    "_make_wrapper_subclass": ("asks autocast what it casts", "tests/training/test_memory.py::test_what_a_model_keeps_that_is_trained_in_part"),
    "_disabled_torch_function_impl": ("as _make_wrapper_subclass", "tests/training/test_memory.py::test_what_a_model_keeps_that_is_trained_in_part"),
    "_to_copy": ("the operator by which autocast casts", "tests/training/test_memory.py::test_what_a_model_keeps_that_is_trained_in_part"),
    "_schema": ("which arguments an operator writes to", "tests/bench/test_lm_head.py::test_counting_by_hand"),
    # transformers
    "_attn_implementation": ("the attention that a model has", "tests/hf/test_refusals.py::test_attention_switched_back_after_preparation"),
    "_can_set_attn_implementation": ("whether a model's attention goes through the interface", "tests/hf/test_refusals.py::test_a_refusal_says_why_and_the_way_out"),
    "_can_set_experts_implementation": ("experts that compute alike in every batch", "tests/proof/test_probe.py::test_exact_in_every_dtype"),
    "_is_stateful": ("models with a recurrent state are refused", "tests/hf/test_refusals.py::test_a_refusal_says_why_and_the_way_out"),
    "_no_split_modules": ("what FSDP wraps", "tests/training/test_distributed.py::test_several_processes_give_the_curve_of_one"),
    "_name_or_path": ("names the model in messages and plans", "tests/training/test_trainer.py::test_a_tokenizer_larger_than_the_model"),
    "_train_batch_size": ("transformers' own batch size while a length is planned", "tests/training/test_trainer.py::test_the_loss_curve_is_the_ordinary_one"),
    "_get_output_dir": ("where checkpoints lie", "tests/training/test_trainer.py::test_the_loss_curve_is_the_ordinary_one"),
    "_prepare_inputs": ("moves a batch to its device", "tests/training/test_trainer.py::test_the_loss_curve_is_the_ordinary_one"),
    # accelerate, datasets, peft
    "_set_sync_gradients": ("no synchronisation between the rows of a step", "tests/training/test_distributed.py::test_fsdp2_with_accumulation_adapters_half_precision_and_losses_that_couple_a_batch"),
    "_fingerprint": ("tokens are kept under the fingerprint of their dataset", "tests/data/test_data.py::test_second_run_comes_from_the_cache"),
    "_distributed": ("a stream that was split by process is refused", "tests/data/test_stream.py::test_sources_that_cannot_be_streamed"),
    "_adapters_disabled": ("adapters that are switched off have no part in a fingerprint", "tests/reference/test_logps.py::test_an_adapter_counts_while_it_is_switched_on"),
    # argparse
    "_actions": ("options by group in the help", "tests/test_cli.py::test_help_is_grouped"),
    "_optionals": ("as _actions", "tests/test_cli.py::test_help_is_grouped"),
    "_group_actions": ("as _actions", "tests/test_cli.py::test_help_is_grouped"),
}
# methods of transformers' Trainer that DPOTrainer replaces
REPLACED = {
    "_get_train_sampler": "tests/training/test_trainer.py::test_sampling_strategies_of_transformers_work",
    "_get_grad_norm": "tests/training/test_trainer.py::test_the_loss_curve_is_the_ordinary_one",
    "_push_from_checkpoint": "tests/runs/test_job.py::test_a_run_that_cannot_be_pushed_is_on_disk",
    "_run_epoch": "tests/training/test_trainer.py::test_the_loss_curve_is_the_ordinary_one",
    "_save_checkpoint": "tests/training/test_checkpoints.py::test_every_file_of_a_checkpoint_is_vouched_for",
    "_set_signature_columns_if_needed": "tests/training/test_trainer.py::test_the_loss_curve_is_the_ordinary_one",
}
# fmt: on
# what Python itself, or the package on models that it prepared, calls so
_OWN_PREFIXES = ("__", "_flexdpo", "_asdict", "_replace", "_fields")


def defined_names(trees: dict[Path, ast.Module]) -> set[str]:
    """Every name that the package gives to something of its own: functions, classes, variables, attributes of self."""
    found: set[str] = set()
    for node in (each for tree in trees.values() for each in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            found.add(node.attr)
        elif isinstance(node, ast.alias) and node.asname:
            found.add(node.asname)
        elif isinstance(node, ast.Dict):
            found |= {key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}
        elif (
            isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) and isinstance(node.slice, ast.Constant)
        ):
            found.add(str(node.slice.value))
    return found


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def _is_private(name: str) -> bool:
    return name.startswith("_") and name != "_" and not name.startswith(_OWN_PREFIXES)


def uses(tree: ast.Module, own: set[str]) -> Iterator[tuple[int, str]]:
    """Line and name of every private name of somebody else: imported, looked up, or asked for as a string."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if _of_library(alias.name)]
        elif isinstance(node, ast.ImportFrom) and _of_library(node.module or ""):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and node.attr not in own:
            names = [node.attr]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
            "getattr",
            "hasattr",
            "setattr",
            "delattr",
        ):
            names = [each.value for each in node.args[1:2] if isinstance(each, ast.Constant)]
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            names = [str(node.slice.value)]
        for name in names:
            if any(_is_private(part) for part in name.split(".")) and name not in own:
                yield node.lineno, name


def _of_library(module: str) -> bool:
    return module.split(".", maxsplit=1)[0] in LIBRARIES


def faults(root: Path) -> list[str]:
    """Every use that is not in the table, every entry without a use, and every test that is not there."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(root.rglob("*.py"))}
    own = defined_names(trees)
    found = [(path, line, name) for path, tree in trees.items() for line, name in uses(tree, own)]
    used = {name for _, _, name in found}
    wrong = [
        f"{path}:{line}: {name} is private; give it a line in {Path(__file__).name}, or do without"
        for path, line, name in found
        if name not in PRIVATE
    ]
    wrong += [f"{name} is used nowhere; take it out of the table" for name in sorted(PRIVATE.keys() - used)]
    wrong += [f"{name} is defined nowhere; take it out of the table" for name in sorted(REPLACED.keys() - own)]
    for name, test in [*((name, test) for name, (_, test) in PRIVATE.items()), *REPLACED.items()]:
        file, _, function = test.partition("::")
        path = root.parent / file
        if not path.is_file() or f"def {function}(" not in path.read_text(encoding="utf-8"):
            wrong.append(f"{name}: there is no test {test}")
    return wrong


if __name__ == "__main__":
    found = faults(Path(__file__).parents[1] / "flexdpo")
    print("\n".join(found) or f"{len(PRIVATE)} private names of other libraries, all accounted for")
    sys.exit(bool(found))
