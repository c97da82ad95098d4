"""The command line as its users meet it: whole runs, interrupted runs, recorded commands, wrong input."""
import json
import os
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from agft.cli import main
from agft.config import load_preset
from agft.core import asset
from agft.loop import read_log
from agft.model import fingerprint
from agft.results import MEAN, MEAN_OF_ALL, Results
from agft.weights import checkpoint_info, load_model, save_model

def agft(*args, **more):
    command = [sys.executable, '-m', 'agft', *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, **more)


def killed_when(ready, *args):
    "Start a command, and kill it as soon as `ready()`."
    command = [sys.executable, '-m', 'agft', *map(str, args)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 300
    while not ready() and process.poll() is None and time.time() < deadline:
        time.sleep(.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


def without_times(path):
    results = json.loads(path.read_text())
    results['about'].pop('seconds')
    return results


def check_intervals(frame):
    for kind in ('clean', 'robust'):
        assert (frame[f'{kind}_low'] <= frame[kind]).all() and (frame[kind] <= frame[f'{kind}_high']).all()
    assert (frame.robust <= frame.clean).all() and (frame.n > 0).all() and (frame.zero_grad == 0).all()


def test_demo_writes_everything_and_repeats_itself(small_preset, tmp_path, capsys):
    args = ['demo', '--preset', small_preset(), '--seeds', '2', '--out']
    for name in 'ab':
        assert main([*args, str(tmp_path/name)]) == 0
    assert without_times(tmp_path/'a'/'results.json') == without_times(tmp_path/'b'/'results.json')
    results = Results.load(tmp_path/'a'/'results.json')
    assert results.methods() == ['CLIP', 'TeCoA', 'AGFT']
    assert {'command', 'threats', 'machine', 'seeds', 'version'} <= set(results.about)
    assert set(results.accuracy.role) == {'source', 'zero-shot', 'mean'}
    check_intervals(results.accuracy)
    page = (tmp_path/'a'/'report.html').read_text()
    assert page.count('<svg') == 5 and 'http' not in page and MEAN in page
    assert 'interval of the paired difference' in page
    assert load_model(tmp_path/'a'/'AGFT-0'/'model.safetensors').name == 'agft-tiny'
    assert MEAN in capsys.readouterr().out


def test_demo_numbers_are_recounted_from_its_flags(small_preset, tmp_path):
    assert main(['demo', '--preset', small_preset(), '--out', str(tmp_path/'d')]) == 0
    rows = Results.load(tmp_path/'d'/'results.json').select(method='AGFT', role='zero-shot').final()
    assert len(rows) == 2
    for task, robust in zip(rows.task, rows.robust, strict=True):
        z = np.load(tmp_path/'d'/'flags'/'AGFT-0'/'fgsm-4_255'/f'{task}.npz')
        assert robust == (z['robust'] & z['clean']).mean() == z['robust'].mean()


def test_tune_searches_with_every_method(small_preset, tmp_path):
    assert main(['tune', '--preset', small_preset(), '--out', str(tmp_path/'t')]) == 0
    trials, tiny = Results.load(tmp_path/'t'/'tune.json').tables['trials'], load_preset('tiny')
    for method in ('TeCoA', 'AGFT'):
        rows, start = trials[trials.method == method], tiny.method(method).lr
        assert len(rows) == 3 and rows.lr.iloc[0] == start and rows.chosen.sum() == 1
        shares = rows[['clean', 'robust', 'kept', 'kept_robust']]
        assert np.allclose(rows.score, shares.mean(axis=1)) and rows.kept.between(0, 1).all()
        assert rows.score[rows.chosen].item() == rows.score.max()


def test_killed_training_resumes_to_the_same_bits(tmp_path):
    args = ['train', '--method', 'AGFT', '--steps', '16', '--train.checkpoint-every', '4', '--train.images',
            '256', '--train.batch-size', '64']
    whole, killed = tmp_path/'whole', tmp_path/'killed'
    assert agft(*args, '--out', whole).returncode == 0
    killed_when((killed/'state.pt').exists, *args, '--out', killed)
    assert not (killed/'model.safetensors').exists(), 'finished before it was killed'
    assert agft(*args, '--out', killed).returncode == 0
    first, second = (load_model(run/'model.safetensors') for run in (whole, killed))
    original = fingerprint(load_model('agft-tiny'))
    assert fingerprint(first) == fingerprint(second) != original
    assert [line['step'] for line in read_log(killed)] == list(range(16))
    assert checkpoint_info(killed/'model.safetensors')['inputs']['teacher'] == original


@pytest.mark.slow
def test_killed_evaluation_writes_the_same_files(tmp_path):
    args = ['eval', 'agft-tiny', '--attacks', 'pgd20,fgsm', '--eps', '1/255,2/255', '--n', '40', '--tasks',
            'source,digits,size']
    whole, killed = tmp_path/'whole', tmp_path/'killed'
    assert agft(*args, '--out', whole).returncode == 0
    killed_when(lambda: [*killed.glob('flags/*/*.npz')], *args, '--out', killed)
    assert not (killed/'results.json').exists(), 'finished before it was killed'
    assert agft(*args, '--out', killed).returncode == 0
    def flags_of(run): return {f.relative_to(run): f.read_bytes() for f in (run/'flags').rglob('*.npz')}
    first, second = flags_of(whole), flags_of(killed)
    assert first == second and len(first) == 4*3
    results = Results.load(whole/'results.json')
    attacks = ['pgd20 1/255', 'pgd20 2/255', 'fgsm 1/255', 'fgsm 2/255']
    assert results.threats() == [*attacks, 'worst case 1/255', 'worst case 2/255']
    assert {MEAN, MEAN_OF_ALL} <= set(results.accuracy.task)
    rows = results.select(eps=2/255).final().query('role != "mean"')
    robust = rows.pivot(index='task', columns='attack', values='robust')
    assert (robust['worst case'] <= robust[['pgd20', 'fgsm']].min(axis=1)).all()


def test_audit_writes_its_verdicts_and_a_page(tmp_path, capsys):
    assert main(['audit', 'agft-tiny', '--n', '6', '--out', str(tmp_path/'a')]) == 0
    found = json.loads((tmp_path/'a'/'audit.json').read_text())['verdicts']
    assert {'zero gradients', 'black box', 'restarts'} <= set(found) and found['zero gradients']['ok']
    page = (tmp_path/'a'/'audit.html').read_text()
    assert page.count('<svg') == 1 and 'http' not in page and all(name in page for name in found)
    assert f' of {len(found)} checks passed.' in page
    assert 'zero gradients' in capsys.readouterr().out


@pytest.mark.parametrize('words, code', [
    ('--help', 0), ('--version', 0), ('', 2), ('tarin', 2), ('data list', 0), ('data check FOLDER', 2),
    ('data check FOLDER/absent', 2), ('demo --seeds 0', 2), ('train --steps 0', 2), ('train --steps x', 2),
    ('train --preset absent.json', 2), ('eval FOLDER/absent.safetensors', 2),
    ('eval agft-tiny --tasks nothing', 2), ('audit agft-tiny --eps 0', 2), ('tune --search.low 1', 2),
    ('bench --preset vit_b32_imagenet', 2),
    ('export absent.safetensors a/b --licence mit --out FOLDER/e', 2),
    ('pretrain --preset vit_b32_imagenet', 2)])
def test_exit_codes(words, code, tmp_path, capsys):
    typed = words.replace('FOLDER', str(tmp_path)).split()
    if len(typed) > 1 and typed[0] not in ('data', 'export'):
        typed += ['--out', str(tmp_path/'out')]
    assert main(typed) == code
    err = capsys.readouterr().err
    assert 'Traceback' not in err and (not typed or err.count('agft:') == (code == 2))


def test_a_reader_that_has_enough_is_no_fault(tmp_path):
    line = f'{sys.executable} -m agft data list | head -1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(['bash', '-c', line], capture_output=True, text=True)
    assert done.returncode in (0, 141) and 'Traceback' not in done.stderr, done.stderr


RECORDED = dict(
    train=['--method', 'AGFT', '--method.gamma', '.6', '--attack.eps', '2/255', '--train.weight-decay', '.1',
           '--seed', '3'],
    eval=['agft-tiny', '--tasks', 'digits,size', '--n', '20', '--attacks', 'fgsm,pgd20',
          '--eps', '1/255,2/255', '--seed', '3'],
    audit=['agft-tiny', '--n', '5', '--eps', '2/255', '--seed', '3'])


def numbers_of(command, out):
    "What a command found."
    if command == 'train':
        return fingerprint(load_model(out/'model.safetensors'))
    if command == 'audit':
        return json.loads((out/'audit.json').read_text())['verdicts']
    return Results.load(out/'results.json').accuracy.to_dict()


@pytest.mark.parametrize('command', RECORDED)
def test_the_recorded_command_typed_again_gives_the_same_numbers(command, small_preset, tmp_path):
    "The benchmark's own is in test_bench.py."
    words = [*RECORDED[command], '--preset', small_preset()]
    assert main([command, *words, '--out', str(tmp_path/'a')]) == 0
    if command == 'train':
        from agft.cli import command_line, parse
        line = command_line(command, parse(command, words))
    else:
        file = dict(eval='results.json', audit='audit.json')[command]
        line = json.loads((tmp_path/'a'/file).read_text())['about']['command']
    assert main([*shlex.split(line)[1:], '--out', str(tmp_path/'b')]) == 0
    assert numbers_of(command, tmp_path/'a') == numbers_of(command, tmp_path/'b')


@pytest.mark.parametrize('old, new', [
    ('train --method AGFT --steps 3 --lr 0.1 --part lora --data D', 'train.adapter lora'),
    ('eval x --threats pgd20 --eps 2/255 --norm L2 --n 5 --prompts openai', 'eval.attacks pgd20'),
    ('audit x --eps 2/255 --n 5', 'images 5')])
def test_old_spellings_still_work(old, new):
    from agft.cli import parse
    from agft.config import flatten
    command, *words = old.split()
    values = {path: value for path, value in flatten(parse(command, words).config).items()}
    path, value = new.split()
    assert str(values[path]).strip("[]'") == value


NO_NETWORK = '''
import socket
def refuse(*a, **k): raise OSError('network is off')
socket.socket.connect = refuse
'''


def test_works_elsewhere_with_no_home_and_no_network(tmp_path):
    home = tmp_path/'no'/'home'          # does not exist, and a file stands where it would be made
    (tmp_path/'no').write_text('')
    (tmp_path/'sitecustomize.py').write_text(NO_NETWORK)
    path = os.pathsep.join([str(tmp_path), os.environ.get('PYTHONPATH', '')])
    env = {**os.environ, 'HOME': str(home), 'PYTHONPATH': path}
    (tmp_path/'cwd').mkdir()
    connect = "import socket; socket.create_connection(('127.0.0.1', 9))"
    refused = subprocess.run([sys.executable, '-c', connect], env=env, capture_output=True, text=True)
    assert 'network is off' in refused.stderr
    done = agft('train', '--method', 'TeCoA', '--steps', '2', '--out', 'run', cwd=tmp_path/'cwd', env=env)
    assert done.returncode == 0, done.stderr
    assert (tmp_path/'cwd'/'run'/'model.safetensors').exists()


WRONG = [
    ('train --method AGTF', ['AGTF', 'TeCoA, AGFT, PMG-AFT']),
    ('train --preset huge', ['huge', 'tiny']),
    ('train --lr -1', ['method.lr is -1', 'greater than 0']),
    ('train --steps -5', ['train.steps is -5', 'greater than or equal to 1']),
    ('train --train.stpes 5', ['--train.stpes', '--train.steps']),
    ('train --device tpu', ['tpu', 'cpu']),
    ('train --method.gamma 2', ['method.gamma is 2', 'less than or equal to 1']),
    ('train --method TeCoA --method.gamma .5', ['TeCoA', 'gamma', 'logit_scale']),
    ('train --attack.loss hinge', ['hinge', 'margin']),
    ('train --plugins none.py', ['none.py']),
    ('train --out FILE', ['is a file']),
    ('train --out OTHER', ['run.json']),
    ('train --out FILE/below', ['cannot be written']),
    ('train --preset photo --out OTHER', ['run.json']),
    ('train --preset photo', ['AGFT_DATA']),
    ('demo --seeds 0', ['0', '1 or more']),
    ('eval agft-tiny --eps 4', ['eps is 4', '4/255']),
    ('eval agft-tiny --eps four', ['four', '4/255']),
    ('eval agft-tiny --eps 1/255,9', ['eps is 9', '4/255']),
    ('eval agft-tiny --attacks pgd20,aa', ["'aa'", 'autoattack']),
    ('eval agft-tiny --norm L1', ["'L1'", "'Linf', 'L2'"]),
    ('eval agft-tiny --norm L2 --attacks mifgsm', ['mifgsm', 'L2', 'Linf']),
    ('audit agft-tiny --eps 0', ['0', 'above 0']),
    ('audit agft-tiny --n -3', ['images is -3', 'greater than or equal to 1']),
    ('eval agft-tiny --n 0', ['images is 0', 'greater than or equal to 1']),
    ('eval missing.safetensors', ['missing.safetensors', 'does not exist']),
    ('eval CUT', ['cut.safetensors', 'truncated']),
    ('eval ALIEN', ['alien.safetensors', 'agft-photo']),
    ('eval agft-huge', ['agft-huge', 'agft-tiny']),
    ('eval agft-photo --preset photo', ['AGFT_DATA']),
    ('pretrain --preset huge', ['huge', 'tiny']),
    ('bench --bench.seeds 0', ['bench.seeds is 0']),
    ('tune --search.low 0', ['search.low is 0', 'greater than 0']),
    ('tarin', ['tarin', 'train'])]
PATHS = {'FILE': 'file', 'FILE/below': 'file/below', 'OTHER': 'other', 'CUT': 'cut.safetensors',
         'ALIEN': 'alien.safetensors'}


@pytest.mark.parametrize('line, words', WRONG, ids=[line for line, _ in WRONG])
def test_bad_input_is_one_line_and_exit_code_2(line:str, words, tmp_path, capsys, monkeypatch):
    args = line.split()
    (tmp_path/'file').write_text('')
    (tmp_path/'other').mkdir()
    (tmp_path/'other'/'thesis.tex').write_text('')
    (tmp_path/'cut.safetensors').write_bytes(asset('agft-tiny.safetensors').read_bytes()[:9999])
    if 'ALIEN' in args:  # a tiny model that says it is the photo architecture
        tiny = load_model('agft-tiny')
        tiny.name = 'agft-photo'
        save_model(tiny, tmp_path/'alien.safetensors')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('AGFT_DATA', str(tmp_path/'nowhere'))
    if '--out' not in args:
        args += ['--out', 'out']
    began = time.time()
    assert main([PATHS.get(word, word) for word in args]) == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and 'Traceback' not in err, err
    for word in words:
        assert word in err, err
    assert time.time() - began < 20 and not (tmp_path/'out'/'model.safetensors').exists()


def test_a_directory_of_another_run_is_refused(small_preset, tmp_path, capsys):
    args = ['demo', '--preset', small_preset(), '--out', str(tmp_path/'d')]
    assert main(args) == 0
    assert main([*args, '--seeds', '2']) == 2
    assert 'seeds (1 there, 2 now)' in capsys.readouterr().err


def test_flags_of_another_model_are_not_taken_for_this_one(tmp_path, capsys):
    "A checkpoint that was trained anew under the same path is another model."
    model = load_model('agft-tiny')
    save_model(model, tmp_path/'m.safetensors')
    checkpoint, out = str(tmp_path/'m.safetensors'), str(tmp_path/'e')
    args = ['eval', checkpoint, '--n', '8', '--attacks', 'fgsm', '--out', out]
    assert main(args) == 0 and main(args) == 0
    next(model.model.visual.parameters()).mul_(1.5)
    save_model(model, tmp_path/'m.safetensors')
    assert main(args) == 2 and 'inputs.model' in capsys.readouterr().err


PLUGIN = '''
import torch
from agft.attack import cross_entropy, pgd
from agft.methods import TeCoA, register_method
from agft.threats import register_attack

@register_attack('one-step', steps=1, how='one step of eps')
def one_step(logits_fn, x, y, eps, norm, generator, loss=cross_entropy):
    return pgd(logits_fn, x, y, eps, eps, 1, None, norm, loss)

@register_method('Doubled')
class Doubled(TeCoA):
    "TeCoA with twice the loss."
    def loss(self, models, batch, x_adv, target):
        loss, numbers = super().loss(models, batch, x_adv, target)
        return 2*loss, numbers
'''


def test_a_plugin_is_known_to_training_evaluation_audit_and_demo(small_preset, tmp_path):
    plugin = tmp_path/'mine.py'
    plugin.write_text(PLUGIN)
    common = ['--preset', small_preset(), '--plugins', str(plugin)]
    run = ['train', '--method', 'Doubled', '--lr', '.001', '--attack.name', 'one-step',
           '--out', str(tmp_path/'run')]
    assert main([*run, *common]) == 0
    checkpoint = str(tmp_path/'run'/'model.safetensors')
    evaluation = ['eval', checkpoint, '--attacks', 'one-step', '--n', '8', '--out', str(tmp_path/'eval')]
    assert main([*evaluation, *common]) == 0
    assert Results.load(tmp_path/'eval'/'results.json').threats() == ['one-step 4/255']
    audited = ['audit', checkpoint, '--attack', 'one-step', '--n', '6', '--out', str(tmp_path/'audit')]
    assert main([*audited, *common]) == 0
    doubled = {'methods': {'Doubled': {'lr': .001}}, 'demo': ['Doubled'], 'plugins': [str(plugin)]}
    (tmp_path/'mine.json').write_text(json.dumps({'base': small_preset(), **doubled}))
    assert main(['demo', '--preset', str(tmp_path/'mine.json'), '--out', str(tmp_path/'demo')]) == 0
    assert Results.load(tmp_path/'demo'/'results.json').methods() == ['CLIP', 'Doubled']


HEAVY = ('torch', 'numpy', 'scipy', 'pandas', 'matplotlib', 'open_clip', 'torchmetrics', 'torchattacks',
         'joblib')
WATCHED = f'''
import sys
from agft.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as e:
    code = e.code
found = sorted(m for m in {HEAVY!r} if m in sys.modules)
print("HEAVY", found, "CODE", code)
'''
HELP = ['--version', '--help', 'train --help', 'bench --help', 'eval --help', 'data --help']
REFUSED = ['train --train.stpes 3', 'train --method AGTF', 'eval x --eps 4', 'tarin']


@pytest.mark.parametrize('args', [*HELP, *REFUSED])
def test_help_and_refusals_import_nothing_heavy(args):
    done = subprocess.run([sys.executable, '-c', WATCHED, *args.split()], capture_output=True, text=True)
    exit_code = 2 if args in REFUSED else 0
    last = done.stdout.splitlines()[-1]
    assert last == f'HEAVY [] CODE {exit_code}', done.stdout[-300:] + done.stderr


def test_import_agft_is_light():
    code = f'import sys, agft; print([m for m in {HEAVY!r} if m in sys.modules])'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '[]'


@pytest.mark.parametrize('count,code', [(2, 2), (1, None)])
def test_a_lost_process_is_one_line(monkeypatch, capsys, count, code):
    def dies(name, options):
        raise RuntimeError('[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:31337')
    monkeypatch.setattr('agft.cli._run', dies)
    monkeypatch.setenv('RANK', '0')
    monkeypatch.setenv('WORLD_SIZE', str(count))
    if code is None:
        with pytest.raises(RuntimeError, match='gloo'):
            main(['data', 'list'])
        return
    assert main(['train', '--steps', '1', '--out', 'x']) == code
    assert capsys.readouterr().err.startswith('agft: another process of this run ended; what it printed')
