"""What a training run will need, before any hardware is there: the real step is compiled from shapes alone.

Memory and communication come from compilers (compilers.py): for TPUs from their own if package libtpu is there, for
GPUs, and without libtpu, from XLA's for CPU on simulated devices, as an estimate: it groups the sums of gradients
otherwise and scatters none (12-layer model on 2 x 4 devices: memory within 6 % of the TPU compiler's, communication
within a factor of 2), and pads nothing, which is added for TPUs (memory.tpu_padding). FLOPs are counted (flops.py),
speeds are what published figures of accelerators (hardware.py) give at a utilisation.
"""

import dataclasses
import math
from typing import Any

from bd3lm_jax.checkpoints import adapt, rundir
from bd3lm_jax.config import Config
from bd3lm_jax.core import log
from bd3lm_jax.core.errors import RunError
from bd3lm_jax.core.hardware import ACCELERATORS, Accelerator
from bd3lm_jax.core.typed import Nested
from bd3lm_jax.data.tokenizers import NUM_BYTES, Tokenizer, get_tokenizer
from bd3lm_jax.planning import compilers, flops
from bd3lm_jax.planning.compilers import SLICES, CompiledCost
from bd3lm_jax.scoring.score import SpecialIds
from bd3lm_jax.training import memory
from bd3lm_jax.training.program import Program, bytes_per_device

GIB, MIB = 2**30, 2**20
ESTIMATE = "cpu"  # the compiler of an estimate; the others are TPUs


def plan(config: Config | Nested, *, target: str, utilisation: float) -> dict[str, Any]:
    """The plan of `train` on the mesh of `config`, where a size of -1 counts as 1; tables on stderr.

    config: as for `train`. target: an accelerator of hardware.ACCELERATORS, or "" for all of them. TPUs that are not
    asked for by name have the figures of the first TPU with a slice of that size.
    utilisation: the part of the peak that the needed FLOPs will reach.

    With a curriculum of block sizes FLOPs and speeds are means over the run, and what is compiled is the step of the
    size with the most FLOPs: most memory too, since both grow with the tokens of a step.

    Raises UserError for a config that `train` would refuse, or a target that cannot be compiled for here. It sets jax
    up for CPU: call it before jax has used a device.
    """
    config = Config.from_dict(adapt.resolve(config))
    sizes = {axis: max(size, 1) for axis, size in dataclasses.asdict(config.mesh).items()}
    config, special = resolve_config(dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **sizes)))
    number = math.prod(sizes.values())
    if target in SLICES:
        compilers.check_tpu(target, number // config.mesh.slices)
    compilers.simulate(number)
    work = phases(config)
    needed = sum(part * flops_ for part, flops_ in work.values())
    config = config.in_phase(max(work, key=lambda size: work[size][1]), False)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, block_sizes=()))
    program = compilers.simulated_program(config, special)
    compiled_by_name = _figures(program, target, _tpu_to_ask(target, number // config.mesh.slices))
    chosen = [ACCELERATORS[target]] if target else list(ACCELERATORS.values())
    figures = {name: _by_kind(program, compiled) for name, compiled in compiled_by_name.items()}
    best = next(iter(figures))
    result = {
        "params": program.num_params, "devices": number, "mesh": sizes, "flops_per_step": needed, "compiler": best,
        **figures[best], "estimate": figures.get(ESTIMATE),
        "expected": [_expected(program, device, compiled_by_name, needed, utilisation) for device in chosen],
    }
    _show(config, result, figures, utilisation)
    return result


def phases(config: Config) -> dict[int, tuple[float, float]]:
    """By block size of the curriculum the part of the run's steps, and the FLOPs of one; else all with the one size."""
    pairs, steps, compiled_by_name = config.train.block_sizes or ((0, config.block_size),), config.train.steps, {}
    for (first, size), end in zip(pairs, [*(start for start, _ in pairs[1:]), steps]):
        part = compiled_by_name.get(size, (0.0, 0.0))[0] + max(min(end, steps) - first, 0) / steps
        at = config.in_phase(size, False)
        compiled_by_name[size] = part, flops.train_step(at.model, at.diffusion, batch=at.train.batch_size,
                                                        length=at.data.seq_len, noise_samples=at.train.noise_samples,
                                                        adaptive_noise=at.adaptive_noise)
    return {size: both for size, both in compiled_by_name.items() if both[0]}


def resolve_config(config: Config) -> tuple[Config, SpecialIds]:
    """The config with its vocabulary size, and the special ids, without reading the corpus."""
    spec = config.data.tokenizer
    size = spec.removeprefix("bpe:")
    if size != spec and size.isdecimal() and int(size) > NUM_BYTES:
        tokenizer = Tokenizer(spec, int(size), 0, int(size))  # what training it will give
    else:
        tokenizer = get_tokenizer(spec, tuple)
    return rundir.resolve(config, tokenizer), SpecialIds(tokenizer.mask_id, tokenizer.end_id)


def _tpu_to_ask(target: str, number: int) -> str | None:
    """The TPU whose compiler has something to say of `target`, if it is here; else why not, in the log."""
    if target:
        return target if target in SLICES else None
    if not compilers.has_tpu_compiler():
        log.note(f"memory and communication are estimated; for those of the TPU compiler: {compilers.INSTALL}")
        return None
    tpu = compilers.tpu_for(number)
    if tpu is None:
        log.note(f"no slice of TPUs has {number} devices: memory and communication are estimated")
    return tpu


def _figures(program: Program, target: str, tpu: str | None) -> dict[str, CompiledCost]:
    """What compilers say, by name, the best first; both work at once."""
    log.note(f"{program.num_params:,} parameters on {_mesh_text(program.mesh.shape)}; compiling the step "
             f"{f'for {tpu}, with the TPU compiler' if tpu else 'for CPU, as an estimate'}")
    future = None if tpu is None else compilers.compile_for_tpu(program.config, program.special, tpu)
    compiled_by_name = {ESTIMATE: compilers.compile_for_cpu(program)} if target not in SLICES else {}
    if tpu is not None and future is not None:
        try:
            return {tpu: future.result(), **compiled_by_name}
        except RunError as error:
            log.note(f"{error}; its figures are estimated")
    return compiled_by_name or {ESTIMATE: compilers.compile_for_cpu(program)}


def _by_kind(program: Program, compiled: CompiledCost) -> dict[str, Any]:
    """Bytes a device, and what it sends; gradients are part of the compiler's temporaries and shown apart."""
    state, batch = program.arguments()
    kinds = {"params": bytes_per_device(state.params), "optimiser": bytes_per_device(state.opt_state),
             "ema": bytes_per_device(state.ema), "gradients": bytes_per_device(state.params),
             "batch": bytes_per_device(batch)}
    kinds |= {"temporaries": max(compiled.total - sum(kinds.values()), 0), "total": compiled.total}
    sent = compiled.communication and {kind: t._asdict() for kind, t in compiled.communication.items()}
    return {"bytes_per_device": kinds, "communication": sent, "compile_s": compiled.seconds}


def _expected(program: Program, accelerator: Accelerator, compiled_by_name: dict[str, CompiledCost], needed: float,
              utilisation: float) -> dict[str, Any]:
    """Whether the step fits, and data tokens a second over all devices: compute or links, whichever takes longer."""
    config = program.config
    name = next(name for name in compiled_by_name if accelerator.name in SLICES or name == ESTIMATE)
    total = compiled_by_name[name].total + (memory.tpu_padding(program)
                                            if name == ESTIMATE and accelerator.name in SLICES else 0)
    traffics = [
        x.communication for x in (compiled_by_name[name], *compiled_by_name.values()) if x.communication is not None
    ]
    sent = sum(traffic.bytes for traffic in traffics[0].values()) if traffics else 0
    compute_s = needed / (program.mesh.size * accelerator.peak_flops * utilisation)
    links_s = sent / accelerator.links_bandwidth
    return {"device": accelerator.name, "compiler": name, "bytes_needed": total,
            "fits": total <= accelerator.usable_memory,
            "tokens_per_s": config.train.batch_size * config.data.seq_len / max(compute_s, links_s),
            "step_ms": 1e3 * max(compute_s, links_s), "bound_by": "compute" if compute_s >= links_s else "links"}


def _mesh_text(sizes: dict[str, int]) -> str:
    return " ".join(f"{axis}={size}" for axis, size in sizes.items())


def _size(number: float) -> str:
    return f"{number / GIB:.2f} GiB" if number >= GIB else f"{number / MIB:.2f} MiB"


def _name(compiler: str) -> str:
    return "estimate" if compiler == ESTIMATE else f"TPU compiler ({compiler})"


def _show(config: Config, result: dict, figures: dict[str, dict], utilisation: float) -> None:
    log.table(f"Plan: {config.train.batch_size} rows of {config.data.seq_len} tokens a step", ("", ""), [
        ("parameters", f"{result['params']:,}"), ("devices", f"{result['devices']} ({_mesh_text(result['mesh'])})"),
        ("FLOPs a step (needed)", f"{result['flops_per_step']:.3e}")])
    rows = [(f"memory: {kind}", *(_size(x["bytes_per_device"][kind]) for x in figures.values()))
            for kind in result["bytes_per_device"]]
    kinds = dict.fromkeys(kind for x in figures.values() for kind in x["communication"] or {})
    rows += [(f"sent a step: {kind}", *(_sent(x["communication"], kind) for x in figures.values())) for kind in kinds]
    rows.append(("compiled in", *(f"{x['compile_s']:.0f} s" for x in figures.values())))
    log.table("What a device needs and sends", ("", *map(_name, figures)), rows)
    by = {"TPUs" if row["device"] in SLICES else "GPUs": _name(row["compiler"]) for row in result["expected"]}
    log.table(f"Expected at {utilisation:.0%} of the bfloat16 peak (memory: "
              f"{', '.join(f'{devices} by {name}' for devices, name in by.items())})",
              ("device", "memory", "needed", "fits", "tokens/s", "ms a step", "bound by"),
              [(row["device"], _size(ACCELERATORS[row["device"]].usable_memory), _size(row["bytes_needed"]),
                "yes" if row["fits"] else "NO", f"{row['tokens_per_s']:,.0f}", f"{row['step_ms']:,.3g}",
                row["bound_by"]) for row in result["expected"]])
    if not any(row["fits"] for row in result["expected"]):
        log.note("to fit: --config.compute.remat=dots, attention or full; --config.compute.microbatch=ROWS; "
                 "--mesh=fsdp=N")


def _sent(communication: dict | None, kind: str) -> str:
    """Bytes and calls of one kind of communication, as far as they are known."""
    if communication is None:
        return "?"
    traffic = communication.get(kind)
    return f"{_size(traffic['bytes'])} in {traffic['calls']} calls" if traffic else "none"
