"""A BLT of transformers with our ops is saved, copied, adapted, trained, distributed and compiled as without them."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from test_transformers import TOLERANCE, assert_same, logits_of, with_gradients
from torch import Tensor, nn
from transformers_blt import batch, their_model

blt = pytest.importorskip("transformers.models.blt.modeling_blt")

from blt_kernels.integrations import transformers as integration  # noqa: E402


def test_saved_and_loaded(tmp_path: Path) -> None:
    """A folder of a changed model is one of transformers, and so is what is loaded from it."""
    model, tokens = their_model("released"), batch(2)
    theirs, names = logits_of(model, tokens), list(model.state_dict())
    with integration.apply(model) as applied:
        assert list(model.state_dict()) == names
        model.save_pretrained(tmp_path)
        loaded = blt.BltForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.equal(logits_of(loaded, tokens), theirs)
        assert not any(applied.report().replaced.values())


def test_pickled() -> None:
    model, tokens = their_model("released"), batch(2)
    theirs, stored = logits_of(model, tokens), io.BytesIO()
    with integration.apply(model):
        torch.save(model, stored)
    stored.seek(0)
    assert torch.equal(logits_of(torch.load(stored, weights_only=False), tokens), theirs)


def test_copied() -> None:
    """A copy is changed too and does not depend on what it was copied from."""
    model, tokens = their_model("released"), batch(2)
    theirs = logits_of(model, tokens)
    with integration.apply(model) as applied:
        other = copy.deepcopy(model)
    with torch.no_grad():
        model.model.local_encoder.embed_tokens.weight.zero_()
    torch.testing.assert_close(logits_of(other, tokens), theirs, rtol=TOLERANCE, atol=TOLERANCE)
    assert applied.report().replaced["BltModel.forward"] == 1


def test_forwards_that_accelerate_surrounds() -> None:
    """It keeps the forward of a module as `_old_forward` and calls it between its hooks."""
    model, tokens = their_model("released"), batch(2)
    theirs, layer, hooks = logits_of(model, tokens), model.model.local_decoder.layers[1].self_attn, []
    layer._old_forward = inner = layer.forward
    layer.forward = outer = lambda *args, **kwargs: hooks.append("hook") or layer._old_forward(*args, **kwargs)
    with integration.apply(model) as applied:
        ours = logits_of(model, tokens)
        assert layer.forward is outer
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)
    assert hooks == ["hook"]
    assert not applied.report().fell_back
    assert layer._old_forward == inner


LORA = {"projections": ["q_proj", "v_proj", "gate_proj"], "tables": ["encoder_hash_tok_embedding", "embed_tokens"]}


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("where", LORA)
def test_low_rank_adapters(where: str, before: bool) -> None:
    peft = pytest.importorskip("peft")

    def adapted(model: nn.Module) -> nn.Module:
        torch.manual_seed(5)
        config = peft.LoraConfig(r=2, target_modules=LORA[where], init_lora_weights=False)
        return peft.get_peft_model(model, config).eval()

    tokens = batch(2)
    theirs = with_gradients(adapted(their_model("bytes")), tokens)
    model = their_model("bytes")
    applied = integration.apply(model) if before else None
    model = adapted(model)
    with applied or integration.apply(model) as applied:
        assert_same(with_gradients(model, tokens), theirs)
    lookups = [name for name, reason in applied.report().fell_back if "no plain Embedding" in reason]
    assert bool(lookups) == (where == "tables")


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model, tokens = their_model("released").train(), batch(2)
    theirs = with_gradients(model, tokens)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with integration.apply(model) as applied:
        if reentrant:  # torch.autograd.grad does not run through it
            model.zero_grad()
            logits = model(tokens).logits
            (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
            gradients = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
            ours = logits.detach(), gradients
        else:
            ours = with_gradients(model, tokens)
    assert_same(ours, theirs)
    layers = sum(isinstance(module, blt.BltSelfAttention) for module in model.modules())
    assert applied.report().replaced["BltSelfAttention.forward"] > layers  # some ran again in backward


def test_autocast() -> None:
    """In bf16 ours is as close to fp32 as theirs is."""
    model, tokens = their_model("bytes"), batch(2)
    exact = logits_of(model, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = logits_of(model, tokens)
        with integration.apply(model):
            ours = logits_of(model, tokens)
    assert ours.dtype == theirs.dtype
    error = [float((x - exact).norm() / exact.norm()) for x in (ours, theirs)]
    assert error[0] < 1.2 * error[1]


# --- several processes ------------------------------------------------------------------------------------------------


def plain(model: nn.Module) -> nn.Module:
    return model


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def fsdp(model: nn.Module) -> nn.Module:
    """Shard every layer and the rest: the hash tables are whole in the forward of the model."""
    from torch.distributed.fsdp import fully_shard

    for module in model.modules():
        if isinstance(module, (blt.BltTransformerLayer, blt.BltCrossAttention)):
            fully_shard(module)
    return fully_shard(model)


def fsdp_tables(model: nn.Module) -> nn.Module:
    """Shard the hash tables by themselves: they are DTensors in the forward of the model."""
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.model.encoder_hash_tok_embedding)
    return fsdp(model)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {f.__name__: f for f in (ddp, fsdp, fsdp_tables)}


def gradients_on(rank: int, wrapper: Callable[[nn.Module], nn.Module], before: bool) -> tuple[Tensor, list, dict]:
    """Return the gradients of a step on the rows of a rank, all of them gathered, and what fell back."""
    model = their_model("bytes")
    applied = integration.apply(model) if before else None
    wrapped = wrapper(model)
    applied = applied or integration.apply(wrapped)
    logits = wrapped(batch(4)[2 * rank : 2 * rank + 2], use_cache=False).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    gradients = [x.grad for x in model.parameters() if x.grad is not None]
    gathered = [x.full_tensor() if hasattr(x, "full_tensor") else x for x in gradients]
    report = applied.report()
    applied.undo()
    return logits.detach(), gathered, report.fell_back


def run_rank(rank: int, meeting: str) -> NoReturn:
    """Compare every wrapper with `plain`, and end this process.

    It ends at once: a thread of gloo may still free a tensor, and where Python has finalized, that aborts the process.
    """
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    alone = [gradients_on(r, plain, False) for r in range(2)]
    mean = [(x + y) / 2 for x, y in zip(alone[0][1], alone[1][1], strict=True)]
    for name, wrapper in WRAPPERS.items():
        for before in (True, False):
            logits, gradients, fell_back = gradients_on(rank, wrapper, before)
            torch.testing.assert_close(logits, alone[rank][0], rtol=TOLERANCE, atol=TOLERANCE)
            for ours, theirs in zip(gradients, mean, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=1e-4)
            assert bool(fell_back) == (name == "fsdp_tables"), fell_back
    dist.barrier()  # the first to end would take the connection from the other one
    os._exit(0)


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    """DDP and FSDP2 have the gradients of one process, whether the ops were put in before or after."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(folders)
    code = "import sys, test_transformers_training as t; t.run_rank(int(sys.argv[1]), sys.argv[2])"
    command = [sys.executable, "-c", code]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "meeting")], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=600)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)[-4000:]


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("case", ["bytes", "released"])
def test_no_more_graph_breaks_than_without(case: str) -> None:
    model, tokens = their_model(case), batch(2)

    def breaks() -> int:
        torch._dynamo.reset()
        with torch.no_grad():
            return torch._dynamo.explain(model)(tokens, use_cache=False).graph_break_count

    theirs = breaks()
    with integration.apply(model):
        ours = breaks()
    torch._dynamo.reset()
    assert ours <= theirs


@pytest.mark.slow
def test_compiled() -> None:
    model, tokens = their_model("released"), batch(2)
    theirs = logits_of(model, tokens)
    with integration.apply(model):
        compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(logits_of(compiled, tokens), theirs, rtol=TOLERANCE, atol=TOLERANCE)
    torch._dynamo.reset()
