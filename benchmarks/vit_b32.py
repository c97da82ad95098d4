"""A full-size encoder under the paper's recipe on packed photographs: images a second, peak memory, hours for ten epochs.

    python benchmarks/vit_b32.py [--preset vit_b32_imagenet] [--device cuda] [--batch N] [--measured 10] [--out results/benchmark_vit_b32.json]

Speed does not depend on what the weights are, so they are random; the pictures are the 1,000 of the ImageNet sample (AGFT_DATA),
written in ImageNet's own layout, packed, and read from the pack. Each method and precision is measured in a process of its own.
"""
import argparse, json, subprocess, sys, tempfile, time
from pathlib import Path
from agft.clip import new_clip, save_clip
from agft.core import load_preset, pick_device, write_json
from agft.data import packs_dir
from agft.registry import classes_of, pack
from agft.report import machine
from agft.train import dry_run


def photographs(root):
    "The sample in ImageNet's layout, packed."
    import numpy as np
    folder = packs_dir()
    with np.load(folder/'imagenet_sample1k.npz') as z: blob, offsets, labels = z['blob'], z['offsets'], z['labels']
    for i, label in enumerate(labels):
        at = root/'imagenet/train'/classes_of('imagenet')[0][label]/f'{i}.JPEG'
        at.parent.mkdir(parents=True, exist_ok=True)
        at.write_bytes(blob[offsets[i]:offsets[i + 1]].tobytes())
    pack(root, 'imagenet', 'train')


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--preset', default='vit_b32_imagenet')
    p.add_argument('--device', default='auto')
    p.add_argument('--batch', type=int, help="pictures a step (default: the preset's)")
    p.add_argument('--measured', type=int, default=10, help='steps that are timed')
    p.add_argument('--out', default='results/benchmark_vit_b32.json')
    p.add_argument('--one', nargs=3, help=argparse.SUPPRESS)    # method, precision, folder: what a process measures
    a = p.parse_args()
    preset = load_preset(a.preset)
    if a.batch: preset['train']['batch_size'] = a.batch
    if a.one:
        method, precision, root = a.one
        preset['train']['precision'] = precision
        preset['model'], preset['data'] = f'{preset["model"].split("@")[0]}@{root}/random.safetensors', dict(root=root)
        print(json.dumps(dry_run(preset, method, device=a.device, measured=a.measured)))
        return
    began, found = time.time(), {}
    with tempfile.TemporaryDirectory() as d:
        photographs(Path(d))
        save_clip(new_clip(preset['model'].split('@')[0]), Path(d)/'random.safetensors')
        for precision in ('bf16', 'fp32'):
            for method in ('TeCoA', 'AGFT'):
                line = [sys.executable, __file__, '--preset', a.preset, '--device', a.device, '--measured', str(a.measured), '--one', method, precision, d]
                if a.batch: line += ['--batch', str(a.batch)]
                plan = json.loads(subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
                found[f'{method} {precision}'] = {k: v for k, v in plan.items() if k not in ('model', 'source', 'method', 'pictures', 'epochs')}
                print(method, precision, found[f'{method} {precision}'], flush=True)
    command = f'python benchmarks/vit_b32.py --preset {a.preset} --device {a.device} --measured {a.measured}' + (f' --batch {a.batch}' if a.batch else '')
    found['about'] = dict(command=command, what='random weights, 1,000 packed photographs of 224 px; hours are for all steps of the preset',
                          machine=machine(pick_device(a.device)), seconds=round(time.time() - began, 1))
    Path(a.out).parent.mkdir(parents=True, exist_ok=True)
    write_json(a.out, found)


if __name__ == '__main__': main()
