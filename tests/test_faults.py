"""Kills, signals, full disks, second processes and damaged files: nothing is lost and nothing is wrong.

    pytest -m slow -s tests/test_faults.py

prints a line for each kind of fault. Every faulty run is repeated with the same command. What it leaves is
the same to the bit as what a run without a fault leaves, or it is refused in one line.
"""
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agft.config import load_preset, override
from agft.core import AgftError
from agft.data import load_task
from agft.model import fingerprint
from agft.threats import threat
from agft.train import finetune
from agft.weights import load_model

pytestmark = pytest.mark.slow


def agft(*words, launch=(), mark='', **more):
    "Start a command in a process group of its own; what it starts inherits the mark."
    env = os.environ | {'OMP_NUM_THREADS': '1', 'AGFT_MARK': str(mark)}
    words = sys.executable, *launch, '-m', 'agft', *words
    return subprocess.Popen([*map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=env, start_new_session=True, **more)


def finished(process):
    "Exit code and output."
    out, _ = process.communicate(timeout=500)
    return process.returncode, out


def refused_in_one_line(code, out):
    lines = [line for line in out.splitlines() if line.startswith('agft:')]
    return code == 2 and len(lines) == 1 and 'Traceback' not in out


def group_members(group):
    "Processes that are still in a process group."
    found = subprocess.run(['ps', '-eo', 'pgid=,stat='], capture_output=True, text=True).stdout
    rows = [line.split() for line in found.splitlines()]
    return [stat for pgid, stat in rows if int(pgid) == group and not stat.startswith('Z')]


def environments():
    "The environment of each process that has not ended."
    found = {}
    for file in Path('/proc').glob('[0-9]*/environ'):
        with contextlib.suppress(OSError):
            found[int(file.parent.name)] = file.read_text(errors='replace').split('\0')
    return found


def marked(mark, *more):
    "Processes with this mark, and with other entries in their environment."
    wanted = {f'AGFT_MARK={mark}', *more}
    return [number for number, entries in environments().items() if wanted <= {*entries}]


def weights(out): return fingerprint(load_model(out/'model.safetensors'))


def rows_of(path):
    "The accuracies of a file of results, without times and commands."
    return json.dumps(json.loads(Path(path).read_text())['tables']['accuracy'])


WORK = {
    'train': (('--method', 'AGFT', '--steps', '12'), weights),
    'eval': (('agft-tiny', '--tasks', 'digits,texture', '--n', '60', '--eval.batch-size', '6'),
             lambda out: rows_of(out/'results.json')),
    'bench': (('--quick',), lambda out: rows_of(out/'results.json')),
}


def command(kind, preset, out, words=None):
    words = words or WORK[kind][0]
    return [kind, *words, '--preset', preset, '--out', out]


@pytest.mark.parametrize('kind, number, times', [
    ('train', signal.SIGKILL, 12), ('eval', signal.SIGKILL, 12), ('bench', signal.SIGKILL, 5),
    ('train', signal.SIGTERM, 4), ('train', signal.SIGINT, 4)])
def test_killed_and_continued(small_preset, tmp_path, kind, number, times):
    preset, result = small_preset(), WORK[kind][1]
    began = time.monotonic()
    code, out = finished(agft(*command(kind, preset, tmp_path/'whole')))
    assert code == 0, out
    whole, expected, draw, codes = time.monotonic() - began, result(tmp_path/'whole'), random.Random(0), []
    for i in range(times):
        out = tmp_path/f'{kind}{i}'
        process = agft(*command(kind, preset, out))
        time.sleep(draw.uniform(.35, .95)*whole)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
        codes.append(finished(process)[0])
        deadline = time.monotonic() + 5
        while group_members(process.pid) and time.monotonic() < deadline:
            time.sleep(.1)
        assert not group_members(process.pid), 'processes live on after their parent'
        code, text = finished(agft(*command(kind, preset, out)))
        assert code == 0 and result(out) == expected, text
    assert {*codes} <= {0, -signal.SIGKILL if number == signal.SIGKILL else 128 + number}
    hit = times - codes.count(0)
    print(f'\n{kind}, {number.name}: {times} runs, {hit} hit, all continued to the same bits')


TORCHRUN = '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2'
TWO = {'train': ('--method', 'AGFT', '--steps', '60'),
       'eval': ('agft-tiny', '--tasks', 'digits,texture', '--eval.images', '60', '--eval.batch-size', '6')}
KILLS = {'train': [('torchrun', signal.SIGKILL), ('torchrun', signal.SIGKILL), ('RANK=0', signal.SIGKILL),
                   ('RANK=1', signal.SIGKILL), ('torchrun', signal.SIGTERM), ('torchrun', signal.SIGTERM)],
         'eval': [('torchrun', signal.SIGKILL), ('RANK=0', signal.SIGKILL), ('RANK=1', signal.SIGKILL)]}


def left_behind(process, mark):
    "Processes that are there five seconds after torchrun has ended; they are killed."
    process.wait(60)
    deadline = time.monotonic() + 5
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(.1)
    left = marked(mark)
    for number in left:
        os.kill(number, signal.SIGKILL)
    process.communicate()
    return left


@pytest.mark.parametrize('kind', TWO)
def test_two_processes_killed_and_continued(small_preset, tmp_path, kind):
    "torchrun is killed, or one of the two processes that it has started."
    preset, result, draw, hits = small_preset(), WORK[kind][1], random.Random(0), 0
    def start(out): return agft(*command(kind, preset, out, TWO[kind]), launch=TORCHRUN, mark=out)
    began = time.monotonic()
    code, text = finished(start(tmp_path/'whole'))
    assert code == 0, text
    whole, expected = time.monotonic() - began, result(tmp_path/'whole')
    for i, (target, number) in enumerate(KILLS[kind]):
        out = tmp_path/f'{kind}{i}'
        process = start(out)
        time.sleep(draw.uniform(.35, .95)*whole)
        for each in [process.pid] if target == 'torchrun' else marked(out, target):
            os.kill(each, number)
        assert not left_behind(process, out)
        hits += process.returncode != 0
        code, text = finished(start(out))
        assert code == 0 and result(out) == expected, text
    print(f'\n{kind} in two processes: {len(KILLS[kind])} runs, {hits} hit, all continued to the same bits')


@pytest.mark.parametrize('kind, number, begun', [
    ('train', signal.SIGKILL, False), ('train', signal.SIGKILL, True), ('train', signal.SIGHUP, True),
    ('eval', signal.SIGKILL, True)])
def test_no_process_outlives_torchrun(tmp_path, kind, number, begun):
    "A run that has hours to go; the signal comes while the processes start, or when they have begun."
    long = {'train': ['--train.steps', '100000', '--train.workers', '1'],
            'eval': ['agft-tiny', '--eval.images', '1000']}
    process = agft(kind, *long[kind], '--out', tmp_path/'a', launch=TORCHRUN, mark=tmp_path/'a')
    while not (tmp_path/'a'/'run.json').exists() if begun else len(marked(tmp_path/'a')) < 3:
        time.sleep(.1)
        assert process.poll() is None
    time.sleep(2)
    process.send_signal(number)
    assert not left_behind(process, tmp_path/'a')


def test_a_signal_loses_no_step(small_preset, tmp_path):
    preset = small_preset(**{'train.checkpoint_every': 1000})
    words = ['train', '--method', 'TeCoA', '--steps', '1000', '--preset', preset, '--out', tmp_path/'a']
    process, log = agft(*words), tmp_path/'a'/'log.jsonl'
    while not log.exists() or len(log.read_text().splitlines()) < 5:
        time.sleep(.1)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    code, out = finished(process)
    steps = len(log.read_text().splitlines())
    assert code == 143 and 'terminated; the same command continues' in out
    process = agft(*words)
    while len(log.read_text().splitlines()) < steps + 3:
        time.sleep(.1)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert finished(process)[0] == 143
    numbers = [json.loads(line)['step'] for line in log.read_text().splitlines()]
    assert numbers == [*range(len(numbers))]
    print(f'\ntrain, SIGTERM between checkpoints: {steps} steps, none repeated')


@pytest.mark.parametrize('kind', ['train', 'eval'])
def test_two_processes_on_one_directory(small_preset, tmp_path, kind):
    preset, result, second = small_preset(), WORK[kind][1], []
    assert finished(agft(*command(kind, preset, tmp_path/'whole')))[0] == 0
    for i in range(5):
        out = tmp_path/f'pair{i}'
        pair = [agft(*command(kind, preset, out)) for _ in range(2)]
        found = [finished(process) for process in pair]
        codes = sorted(code for code, _ in found)
        assert codes[0] == 0, found
        for code, text in found:
            assert code == 0 or refused_in_one_line(code, text) and 'is in use by process' in text, text
        assert result(out) == result(tmp_path/'whole')
        second.append(codes[1])
    print(f'\n{kind}, two processes: 5 pairs, {second.count(2)} refused, the others waited; one result each')


@pytest.mark.parametrize('size', [100, 10_000, 100_000, 400_000, 800_000, 1_200_000])
def test_a_full_disk(small_preset, tmp_path, size):
    preset, out = small_preset(), tmp_path/'run'
    def limited(): resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    code, text = finished(agft(*command('train', preset, out), preexec_fn=limited))
    assert code == 0 or refused_in_one_line(code, text), text
    assert not list(out.rglob('.*.tmp'))
    assert finished(agft(*command('train', preset, out)))[0] == 0
    assert finished(agft(*command('train', preset, tmp_path/'whole')))[0] == 0
    assert weights(out) == weights(tmp_path/'whole')
    told = text.strip()[-150:]
    print(f'\ntrain, no file above {size} bytes: exit {code}, continued to the same bits; {told}')


def flip(file, draw):
    "Change one bit."
    held = bytearray(file.read_bytes())
    held[draw.randrange(len(held))] ^= 1 << draw.randrange(8)
    file.write_bytes(held)


def test_damaged_files_of_a_training(tmp_path, interrupted):
    config = override(load_preset('tiny').finetune('AGFT'), **{
        'train.images': 16, 'train.batch_size': 8, 'train.steps': 4, 'train.checkpoint_every': 1})
    model, task = load_model('agft-tiny'), load_task('texture', n=16, split='train')
    def run(out): return fingerprint(finetune(config, out, 'cpu', model, task))
    expected = run(tmp_path/'whole')
    interrupted(3, lambda: run(tmp_path/'cut'))
    draw, refused = random.Random(0), 0
    places = [(tmp_path/'cut', name) for name in ('state.pt', 'teacher.pt', 'run.json', 'log.jsonl')]
    places.append((tmp_path/'whole', 'model.safetensors'))
    for i in range(20):
        origin, name = places[i % len(places)]
        out = tmp_path/f'damaged{i}'
        shutil.copytree(origin, out)
        flip(out/name, draw)
        try:
            assert run(out) == expected, name
        except AgftError as e:
            assert '\n' not in str(e)
            refused += 1
    print(f'\ntrain, one bit changed: 20 files, {refused} refused, {20 - refused} without effect')


def test_damaged_files_of_an_evaluation(tmp_path):
    from agft.evaluation import evaluate_tasks
    model, tasks, fgsm = load_model('agft-tiny'), [load_task('digits', 12)], threat('fgsm', 4/255)
    expected = evaluate_tasks(model, tasks, tmp_path/'whole', fgsm, batch_size=4)['digits']
    draw, refused = random.Random(0), 0
    for i in range(10):
        out = tmp_path/f'damaged{i}'
        shutil.copytree(tmp_path/'whole', out)
        flip(out/'digits.npz', draw)
        try:
            found = evaluate_tasks(model, tasks, out, fgsm, batch_size=4)['digits']
            assert found.robust.tolist() == expected.robust.tolist()
            assert found.distance.tobytes() == expected.distance.tobytes()
        except AgftError:
            refused += 1
    print(f'\neval, one bit changed: 10 files, {refused} refused, {10 - refused} without effect')
