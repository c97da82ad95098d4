"""What the public code of the methods computes on four images, and what agft computes on them.

`oracle.npz` holds the numbers of the public code for a small encoder of random weights; `oracle.json` says
from which commits, and what each array is.
"""
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from agft.attack import pgd
from agft.core import read_json
from agft.methods import TGAZSR, Batch, Method, Models, method
from agft.model import ZeroShotCLIP

HERE = Path(__file__).parent
ABOUT = read_json(HERE/'oracle.json')
ORACLE = {key: torch.from_numpy(value) for key, value in np.load(HERE/'oracle.npz').items()}
EPS = float(ORACLE['eps'])
PLAIN = 'bicubic-plain'
RESIZE = dict(agft='bicubic', tecoa=PLAIN, tga=PLAIN, pmg=PLAIN, fare='bilinear')  # FARE's is not applied
PARTS = {'pmg': ('ce', 'kl_teacher', 'kl_clean'), 'pmg_agft': ('ce', 'kl_teacher', 'kl_clean'),
         'tga': ('ce', 'map_adv', 'map_clean')}
METHODS = {  # name in the oracle -> name and settings here
    'agft': ('AGFT', dict(logit_scale=180., gamma=.4)), 'soft': ('Soft', {}), 'tecoa': ('TeCoA', {}),
    'tecoa_agft': ('TeCoA', {}), 'pmg': ('PMG-AFT', {}), 'pmg_agft': ('PMG-AFT-mean', {}),
    'tga': ('TGA-ZSR', {}), 'tga_agft': ('TGA-ZSR-mean', {}), 'fare2': ('FARE', {}), 'fare10': ('FARE', {})}


class Case(NamedTuple):
    "An entry of the oracle, ready to be computed here."
    method:Method
    models:Models
    batch:Batch
    start:torch.Tensor   # of the attack
    x_adv:torch.Tensor   # adversarial images of the public code


def encoder(who:str, preprocessing:str)->ZeroShotCLIP:
    "The teacher or the student of the oracle, with the preprocessing of one code base."
    import open_clip  # after agft.model, which prepares torchvision
    config = ABOUT['model']['open_clip_config']
    vision, text = open_clip.CLIPVisionCfg(**config['vision_cfg']), open_clip.CLIPTextCfg(layers=1, width=64)
    model = open_clip.CLIP(config['embed_dim'], vision, text, quick_gelu=config['quick_gelu'])
    prefix = f'{who}.visual.'
    weights = [key for key in ORACLE if key.startswith(prefix)]
    model.visual.load_state_dict({key.removeprefix(prefix): ORACLE[key].float() for key in weights})
    about = ABOUT['preprocessing'][preprocessing]
    norm = dict(size=224, mean=about['mean'], std=about['std'])
    return ZeroShotCLIP(model, None, who, RESIZE[preprocessing], norm).requires_grad_(False).eval()


def case(name:str)->Case:
    "Method, models, batch and images of an entry."
    preprocessing, (ours, settings) = ABOUT['methods'][name]['preprocessing'], METHODS[name]
    models = Models(encoder('student', preprocessing), encoder('teacher', preprocessing), ORACLE['head'])
    models.student.visual.requires_grad_(True)
    x, y, noise = ORACLE['images'].float()/255, ORACLE['labels'], ORACLE['noise'].float()
    if preprocessing == 'fare':  # two images at 224 px, each pixel repeated 7 x 7
        x, noise = [t[:2].repeat_interleave(7, -1).repeat_interleave(7, -2) for t in (x, noise)]
        y = y[:2]
    m = method(ours, **settings)
    batch = Batch(x, y, m.teacher_features(models.teacher, x))
    return Case(m, models, batch, x + EPS*noise, x + EPS*ORACLE[f'{name}.delta'].float())


def largest(a:torch.Tensor, b:torch.Tensor)->float: return float((a - b).abs().max())


def compare(name:str)->dict[str, Any]:
    "The differences between agft and the public code for one entry; None for what the entry does not have."
    m, models, batch, start, x_adv = case(name)
    target, about = m.target(models, batch), ABOUT['methods'][name]
    def outputs(x): return m.outputs(models, batch, x)
    attack_loss:Any = m.attack_loss
    attacked = pgd(outputs, batch.x, target, EPS, EPS, about['steps'], start, loss=attack_loss)
    loss, numbers = m.loss(models, batch, x_adv, target)
    loss.backward()
    theirs = ORACLE[f'{name}.loss'].item()
    parameters = dict(models.student.visual.named_parameters())
    gradients = []
    for key in [key for key in ORACLE if key.startswith(f'{name}.grad.visual.')]:
        ours:Any = parameters[key.removeprefix(f'{name}.grad.visual.')].grad
        gradients.append(largest(ours, ORACLE[key])/float(ORACLE[key].abs().max()))
    stored = ORACLE.get(f'{name}.target')
    weights = dict(map_adv=m.alpha, map_clean=m.beta) if isinstance(m, TGAZSR) else {}
    parts = [abs(weights.get(part, 1)*numbers[part].item() - value.item())
             for part, value in zip(PARTS.get(name, ()), ORACLE.get(f'{name}.parts', ()), strict=True)]
    with torch.no_grad():
        if f'{name}.logits' in ORACLE:
            output = largest(m.logits(models, x_adv), ORACLE[f'{name}.logits'])
        else:
            output = largest(models.student.features(x_adv), ORACLE[f'{name}.embedding'])
    return dict(
        target=None if stored is None else largest(target, stored),
        pixels=int(((attacked - x_adv).abs() > 1e-6).sum()),
        of=x_adv.numel(),
        output=output,
        loss=theirs,
        loss_difference=abs(loss.item() - theirs),
        parts=max(parts, default=None),
        gradients=max(gradients),
        gradients_compared=len(gradients))
