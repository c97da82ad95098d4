"""Read an exported folder where agft cannot be imported: without_agft.py FUNCTION FOLDER INPUTS OUT.

FUNCTION is one of this file. INPUTS holds uint8 images (N,3,H,W) and texts, OUT the results; torch.save wrote
both.
"""
import sys
from typing import Any

import torch

modules:dict[str, Any] = sys.modules
modules['agft'] = None  # `import agft` is an ImportError from now on


def import_torchvision():
    "Import torchvision, also beside a torch that its compiled library does not fit."
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.split('.')[0] == 'torchvision']:
            del sys.modules[name]
        lib = torch.library.Library('torchvision', 'DEF')
        for op in ('nms', 'qnms'):
            lib.define(f'{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
        import torchvision  # noqa: F401
        return lib  # the declarations live as long as this object


def open_clip(folder, images, texts):
    "Tokens and logits of open_clip, with its own preprocessing."
    import open_clip
    from torchvision.transforms.functional import to_pil_image
    source = f'local-dir:{folder}'
    parts:Any = open_clip.create_model_and_transforms(source)
    model, _, preprocess = parts
    tokens = open_clip.get_tokenizer(source)(texts)
    pixels = torch.stack([preprocess(to_pil_image(image)) for image in images])
    return tokens, model.eval().get_logits(pixels, tokens)[0]


def transformers(folder, images, texts):
    "Tokens and logits of transformers, with its own preprocessing."
    from transformers import CLIPModel, CLIPProcessor
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    inputs = processor(text=texts, images=list(images), padding=True, return_tensors='pt')
    return inputs['input_ids'], model.eval()(**inputs).logits_per_image


def vision(folder, images, texts):
    "Embeddings with and without the projection of transformers' image encoders."
    from transformers import AutoImageProcessor, CLIPVisionModel, CLIPVisionModelWithProjection
    inputs = AutoImageProcessor.from_pretrained(folder)(images=list(images), return_tensors='pt')
    projected = CLIPVisionModelWithProjection.from_pretrained(folder).eval()(**inputs).image_embeds
    return projected, CLIPVisionModel.from_pretrained(folder).eval()(**inputs).pooler_output


if __name__ == '__main__':
    function, folder, inputs, out = sys.argv[1:]
    kept = import_torchvision()
    with torch.no_grad():
        torch.save(globals()[function](folder, **torch.load(inputs)), out)
