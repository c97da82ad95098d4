"""agft makes CLIP robust to adversarial images and keeps its image-text alignment.

It fine-tunes the image encoder on adversarial images towards the calibrated soft predictions of the original
model, and measures zero-shot accuracy, clean and under attack. The package is exported from the notebooks in
`nbs/`, one chapter a module. Importing it imports nothing large: public names are imported at first use.
"""
# ruff: noqa: F401
__version__ = "0.1.0"

import importlib
from typing import TYPE_CHECKING

_PUBLIC = dict(  # public name -> chapter
    load_model='weights', save_model='weights', load_weights='weights',
    from_modules='model', from_transformers='model', ZeroShotCLIP='model',
    Task='data', load_task='data', load_tasks='data', finetune='api', evaluate='api', audit='api',
    pgd='attack', apgd='attack', apgd_targeted='attack', cw='attack',
    threat='threats', register_attack='threats',
    method='methods', register_method='methods', load_preset='config', override='config', Results='results',
    AgftError='core')
__all__ = list(_PUBLIC)


def __getattr__(name: str):
    "A public name, imported from its chapter when it is first used (PEP 562)."
    if name not in _PUBLIC:
        raise AttributeError(f'module agft has no attribute {name!r}; public: {", ".join(__all__)}')
    value = getattr(importlib.import_module(f'agft.{_PUBLIC[name]}'), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


if TYPE_CHECKING:  # for type checkers and editors, which cannot look names up
    from agft.api import audit, evaluate, finetune
    from agft.attack import apgd, apgd_targeted, cw, pgd
    from agft.config import load_preset, override
    from agft.core import AgftError
    from agft.data import Task, load_task, load_tasks
    from agft.methods import method, register_method
    from agft.model import ZeroShotCLIP, from_modules, from_transformers
    from agft.results import Results
    from agft.threats import register_attack, threat
    from agft.weights import load_model, load_weights, save_model
