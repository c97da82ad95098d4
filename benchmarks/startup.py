"""Processor time until the command line answers, beside `python -c "import torch"`.

    python benchmarks/startup.py [--rounds 7] [--out results/benchmark_startup.json]

Help, version and the refusal of a wrong option import no large library. Commands take turns with the
reference. A row is the median of the rounds; its ratio is the median of the ratios to the reference in the
same round.
"""
import argparse
import resource
import statistics
import subprocess
import sys
import time

from agft.report import machine
from agft.results import Results, table

REFERENCE = [sys.executable, '-c', 'import torch']
COMMANDS = {'import agft': [sys.executable, '-c', 'import agft']}
LINES = ('--version', '--help', 'train --help', 'bench --help', 'eval --help', 'train --train.stpes 3',
         'train --method AGTF')
for line in LINES:
    COMMANDS[f'agft {line}'] = [sys.executable, '-m', 'agft', *line.split()]


def cpu_seconds(command):
    "User and system time of a process."
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def median(values): return round(statistics.median(values), 3)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--rounds', type=int, default=7)
    p.add_argument('--out', default='results/benchmark_startup.json')
    args = p.parse_args()
    began, reference, seconds = time.time(), [], {name: [] for name in COMMANDS}
    for round_ in range(-1, args.rounds):  # round -1 warms the caches up
        torch = cpu_seconds(REFERENCE)
        found = {name: cpu_seconds(command) for name, command in COMMANDS.items()}
        if round_ < 0:
            continue
        reference.append(torch)
        for name, value in found.items():
            seconds[name].append(value)
    rows = [dict(what='import torch', cpu_seconds=median(reference), ratio=1.)]
    for name, values in seconds.items():
        ratios = [value/torch for value, torch in zip(values, reference, strict=True)]
        rows.append(dict(what=name, cpu_seconds=median(values), ratio=median(ratios)))
    for row in rows:
        print(row)
    command = f'python benchmarks/startup.py --rounds {args.rounds}'
    about = dict(command=command, n=args.rounds, machine=machine(), seconds=round(time.time() - began, 1))
    Results.from_records([], about=about, tables=dict(startup=table(rows))).save(args.out)


if __name__ == '__main__':
    main()
