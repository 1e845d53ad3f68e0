import torch, transformers, sys
from tests.hf.architectures import zoo, build_model
from flexdpo.hf.mixer_kernels import *
from flexdpo.hf.unwrap import backbone_of
from flexdpo.hf.rules import refusal_reason
for n,a in zoo().items():
    try:
        with torch.device("meta"):
            cfg=getattr(transformers,a.config_class)(**a.config); m=getattr(transformers,a.class_name)._from_config(cfg)
        b=backbone_of(m)
    except Exception as e:
        continue
    w={type(x).__name__ for x in mixers_of(b).values() if runs_whole(x)}
    if w: print(n,a.verdict,w,round(share_unfolded(b),2),"|",refusal_reason(b))
