"""What tests/test_routing_gpu.py does in processes of its own, without the checks of annotations that tests have.

In one of them Triton's interpreter plays the GPU; in another one Triton translates kernels for real GPUs.
"""

import os

import torch


def interpret() -> None:
    """From now on kernels are run by Triton's interpreter; to be called before Triton is loaded."""
    os.environ["TRITON_INTERPRET"] = "1"


def differences(sizes: tuple[int, ...], rounds: int, over: str, sharpness: float, dtype: torch.dtype) -> list[float]:
    """How far couplings, capsules and agreement lie at most from the plain way in double precision."""
    from capsnb import routing_gpu, squash
    from capsnb.routing import route_steps

    (images, lower, upper, d, e), rng = sizes, torch.Generator().manual_seed(0)
    x = squash(torch.randn(images, lower, e, generator=rng, dtype=torch.float64))
    x[0, 0] = 0
    W = torch.randn(lower, upper, d, e, generator=rng, dtype=torch.float64)
    on = torch.rand(images, lower, generator=rng) < 0.8
    found = routing_gpu.route(x.to(dtype), on.to(dtype), W.to(dtype), rounds, over == "upper", sharpness)
    expected = route_steps(x, W, rounds=rounds, over=over, sharpness=sharpness, on=on)[-1]
    return [(here.double() - plain).abs().max().item() for here, plain in zip(found, expected)]


NUMBERS = dict.fromkeys(("batch", "lower", "upper", "parts", "capsules"), "i32") | {"sharpness": "fp32"}


def translated(capability: int, over_upper: bool) -> dict[str, tuple[int, int]]:
    """Every kernel at the sizes of the paper, as code for GPUs of that compute capability: bytes of code, of memory.

    The memory is that which the threads of a program share.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from capsnb import routing_gpu

    blocks = {"D": 16, "BLOCK_D": 16, "OVER_UPPER": over_upper}
    tile = {"E": 8, "BLOCK_J": 32, "IMAGES": 8, "LOWER": routing_gpu.PART, "FIRST": not over_upper, "LAST": over_upper}
    constants_of = {"_mix": blocks | tile, "_turn": blocks | {"BLOCK_PARTS": routing_gpu.PARTS_AT_ONCE}}
    warps, made = {"_mix": routing_gpu.MIX_WARPS, "_turn": routing_gpu.TURN_WARPS}, {}
    for name, constants in constants_of.items():
        function = getattr(routing_gpu, name)
        kinds = NUMBERS | dict.fromkeys(constants, "constexpr")
        signature = {argument: kinds.get(argument, "*fp32") for argument in function.arg_names}
        source = ASTSource(function, signature=signature, constexprs=constants)
        kernel = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps[name]})
        made[name] = len(kernel.asm["cubin"]), kernel.metadata.shared
    return made
