"""A full-size encoder under the paper's recipe on packed photographs: images a second, peak memory, hours.

    python benchmarks/vit_b32.py [--preset vit_b32_imagenet] [--device cuda] [--batch N] [--measured 10]
                                 [--out results/benchmark_vit_b32.json]

Speed does not depend on what the weights are, so they are random. The images are the 1,000 of the ImageNet
sample (AGFT_DATA), written in ImageNet's own layout, packed, and read from the pack. Each method and
precision is measured in a process of its own.
"""
import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from agft.config import load_preset, override
from agft.core import AgftError, pick_device
from agft.data import archives_dir
from agft.registry import classes_of, pack
from agft.report import machine
from agft.results import Results, table
from agft.train import dry_run
from agft.weights import new_model, save_model

SHOWN = ('method', 'lr', 'steps', 'batch_size', 'milliseconds_a_step', 'images_a_second', 'peak_memory_gib',
         'hours')
WHAT = 'random weights, 1,000 packed photographs of 224 px; hours are for all steps of the preset'


def photographs(root):
    "The sample in ImageNet's layout, packed."
    import numpy as np
    folder = archives_dir()
    if folder is None:
        raise AgftError('no folder of photographs; set AGFT_DATA to the folder with imagenet_sample1k.npz')
    with np.load(folder/'imagenet_sample1k.npz') as archive:
        blob, offsets, labels = archive['blob'], archive['offsets'], archive['labels']
    classes, _ = classes_of('imagenet')
    for i, label in enumerate(labels):
        path = root/'imagenet/train'/classes[label]/f'{i}.JPEG'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(blob[offsets[i]:offsets[i + 1]].tobytes())
    pack(root, 'imagenet', 'train')


def architecture(recipe): return recipe.model.name.split('@')[0]


def measure(recipe, method, precision, root, args):
    "Print the plan of one method in one precision."
    config = override(recipe.finetune(method), **{
        'model.name': f'{architecture(recipe)}@{root}/random.safetensors', 'data.root': root,
        'train.precision': precision, 'train.batch_size': args.batch or recipe.train.batch_size})
    print(json.dumps(dry_run(config, args.device, args.measured)))


def measured_alone(method, precision, root, args):
    "The plan that another process prints."
    line = [sys.executable, __file__, '--preset', args.preset, '--device', args.device,
            '--measured', str(args.measured), '--one', method, precision, root]
    if args.batch:
        line += ['--batch', str(args.batch)]
    done = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True)
    plan = json.loads(done.stdout.splitlines()[-1])
    return {key: plan[key] for key in SHOWN} | dict(precision=precision)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--preset', default='vit_b32_imagenet')
    p.add_argument('--device', default='auto')
    p.add_argument('--batch', type=int, help="images a step (default: the preset's)")
    p.add_argument('--measured', type=int, default=10, help='steps that are timed')
    p.add_argument('--out', default='results/benchmark_vit_b32.json')
    p.add_argument('--one', nargs=3, help=argparse.SUPPRESS) # method, precision, folder, for one process
    args = p.parse_args()
    recipe = load_preset(args.preset)
    if args.one:
        method, precision, root = args.one
        measure(recipe, method, precision, root, args)
        return
    began, rows = time.time(), []
    with tempfile.TemporaryDirectory() as root:
        photographs(Path(root))
        save_model(new_model(architecture(recipe)), Path(root)/'random.safetensors')
        for precision in ('bf16', 'fp32'):
            for method in ('TeCoA', 'AGFT'):
                rows.append(measured_alone(method, precision, root, args))
                print(json.dumps(rows[-1]), flush=True)
    options = f'--preset {args.preset} --device {args.device} --measured {args.measured}'
    command = f'python benchmarks/vit_b32.py {options}'
    if args.batch:
        command += f' --batch {args.batch}'
    seconds = round(time.time() - began, 1)
    hardware = machine(pick_device(args.device))
    about = dict(command=command, what=WHAT, machine=hardware, seconds=seconds)
    Results.from_records([], about=about, tables=dict(vit_b32=table(rows))).save(args.out)


if __name__ == '__main__':
    main()
