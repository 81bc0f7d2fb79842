"""`moefx.optimize`: the whole compiler on one page."""
from __future__ import annotations
from typing import Any
import torch
from torch import nn
from . import compat
from .capture import as_call, capture, warm_up
from .joint import trace_joint, split, compiler
from .module import OptimizedModule, Variant
from .passes.raise_experts import raised
from .program import Program

def compile_variant(module, args, kwargs, loose_key):
    model=module.original
    o=module._options
    grad = torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters())
    warm_up(model,args,kwargs)
    with raised(model) as blocks:
        captured = capture(model, args, kwargs)
    joint = trace_joint(captured, grad=grad, codegen=o["codegen"])
    if grad:
        fw,bw=split(joint, codegen=o["codegen"])
    else: fw,bw=joint.gm,None
    prog=Program(joint, fw,bw,compiler(o["codegen"],inference=bw is None),compiler(o["codegen"],backward=True))
    return Variant(prog,{},loose_key)

def optimize(model, example_inputs, *, codegen="inductor"):
    m=OptimizedModule(model, compile_variant, dict(codegen=codegen), None)
    return m
