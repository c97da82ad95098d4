"""The command line as its users meet it: whole runs, interrupted runs, wrong input."""
import json, os, signal, subprocess, sys, time
import numpy as np, pytest
from agft.bench import neighbours
from agft.cli import main
from agft.clip import checkpoint_info, fingerprint, load_clip


def agft(*args, **kw):
    return subprocess.run([sys.executable, '-m', 'agft', *map(str, args)], capture_output=True, text=True, timeout=600, **kw)


def without_times(path):
    results = json.loads(path.read_text())
    results['about'].pop('seconds')
    return results


def test_demo_writes_everything_and_repeats_itself(small_preset, tmp_path, capsys):
    for name in 'ab': assert main(['demo', '--out', str(tmp_path/name), '--seeds', '2']) == 0
    a = without_times(tmp_path/'a'/'results.json')
    assert a == without_times(tmp_path/'b'/'results.json')
    assert set(a) == {'CLIP', 'TeCoA', 'AGFT', 'about'} and {'command', 'threat', 'machine', 'seeds', 'version'} <= set(a['about'])
    for method in ('CLIP', 'TeCoA', 'AGFT'):
        for task, e in a[method].items():
            assert 0 <= e['robust'] <= e['clean'] <= 1 and e['n'] > 0 and e['zero_grad'] == 0, (method, task)
            assert e['ci']['clean'][0] <= e['clean'] <= e['ci']['clean'][1] and e['ci']['robust'][0] <= e['robust'] <= e['ci']['robust'][1]
    page = (tmp_path/'a'/'report.html').read_text()
    assert page.count('data:image/png') == 5 and 'src="http' not in page and 'zero-shot mean' in page
    assert load_clip(tmp_path/'a'/'AGFT-0'/'model.safetensors').name == 'agft-tiny'
    assert 'zero-shot mean' in capsys.readouterr().out


def test_demo_numbers_are_recounted_from_its_flags(small_preset, tmp_path):
    main(['demo', '--out', str(tmp_path/'d')])
    results = json.loads((tmp_path/'d'/'results.json').read_text())
    for task in small_preset('tiny')['zero_shot']:
        z = np.load(tmp_path/'d'/'flags'/'AGFT-0'/'fgsm-4_255'/f'{task}.npz')
        assert results['AGFT'][task]['robust'] == (z['robust'] & z['clean']).mean() == z['robust'].mean()


def test_tune_climbs_with_every_method(small_preset, tmp_path):
    assert main(['tune', '--out', str(tmp_path/'t')]) == 0
    found = json.loads((tmp_path/'t'/'tune.json').read_text())
    for m in ('TeCoA', 'AGFT'):
        total = {float(lr): s['clean'] + s['robust'] for lr, s in found[m]['scores'].items()}
        best = found[m]['best']
        assert best == max(total, key=total.get) or total[best] == max(total.values())
        assert set(neighbours(best)) <= set(total), 'a rate at the edge of what was tried'
        assert small_preset('tiny')['methods'][m]['lr'] in total


def test_killed_training_resumes_to_the_same_bits(tmp_path):
    args = ['train', '--method', 'AGFT', '--steps', '45']
    assert agft(*args, '--out', tmp_path/'whole').returncode == 0
    log = tmp_path/'killed'/'log.jsonl'
    p = subprocess.Popen([sys.executable, '-m', 'agft', *args, '--out', str(tmp_path/'killed')], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 300
    while not (tmp_path/'killed'/'state.pt').exists() and p.poll() is None and time.time() < deadline: time.sleep(.02)
    p.send_signal(signal.SIGKILL); p.wait()
    assert not (tmp_path/'killed'/'model.safetensors').exists(), 'finished before it was killed'
    assert agft(*args, '--out', tmp_path/'killed').returncode == 0
    whole, killed = (load_clip(tmp_path/n/'model.safetensors') for n in ('whole', 'killed'))
    assert fingerprint(whole) == fingerprint(killed) != fingerprint(load_clip('agft-tiny'))
    assert [json.loads(l)['step'] for l in log.read_text().splitlines()] == list(range(45))
    assert checkpoint_info(tmp_path/'killed'/'model.safetensors')['teacher'] == fingerprint(load_clip('agft-tiny'))


def test_killed_evaluation_writes_the_same_files(tmp_path):
    args = ['eval', 'agft-tiny', '--threats', 'pgd20,fgsm', '--eps', '1/255,2/255', '--n', '40']
    assert agft(*args, '--out', tmp_path/'whole').returncode == 0
    p = subprocess.Popen([sys.executable, '-m', 'agft', *args, '--out', str(tmp_path/'killed')], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 300
    while not [*tmp_path.glob('killed/flags/*/*.npz')] and p.poll() is None and time.time() < deadline: time.sleep(.02)
    p.send_signal(signal.SIGKILL); p.wait()
    assert not (tmp_path/'killed'/'results.json').exists(), 'finished before it was killed'
    assert agft(*args, '--out', tmp_path/'killed').returncode == 0
    files = {n: {f.relative_to(tmp_path/n): f.read_bytes() for f in (tmp_path/n/'flags').rglob('*.npz')} for n in ('whole', 'killed')}
    assert files['whole'] == files['killed'] and len(files['whole']) == 4*10
    results = json.loads((tmp_path/'whole'/'results.json').read_text())
    assert list(results) == ['pgd20 1/255', 'pgd20 2/255', 'fgsm 1/255', 'fgsm 2/255', 'worst case 1/255', 'worst case 2/255', 'about']
    for task, e in results['worst case 2/255'].items(): assert e['robust'] <= min(results[f'{t} 2/255'][task]['robust'] for t in ('pgd20', 'fgsm'))


def test_audit_writes_its_verdicts_and_a_page(tmp_path, capsys):
    assert main(['audit', 'agft-tiny', '--n', '6', '--out', str(tmp_path/'a')]) == 0
    found = json.loads((tmp_path/'a'/'audit.json').read_text())
    assert {'zero gradients', 'black box', 'restarts'} <= set(found['verdicts']) and found['verdicts']['zero gradients']['ok']
    page = (tmp_path/'a'/'audit.html').read_text()
    assert page.count('data:image/png') == 1 and all(name in page for name in found['verdicts'])
    assert 'zero gradients' in capsys.readouterr().out


def test_works_elsewhere_with_no_home_and_no_network(tmp_path):
    home = tmp_path/'no'/'home'          # does not exist, and a file stands where it would be made
    (tmp_path/'no').write_text('')
    block = "import socket\ndef refuse(*a, **k): raise OSError('network is off')\nsocket.socket.connect = refuse\n"
    (tmp_path/'sitecustomize.py').write_text(block)
    env = {**os.environ, 'HOME': str(home), 'PYTHONPATH': os.pathsep.join([str(tmp_path), os.environ.get('PYTHONPATH', '')])}
    (tmp_path/'cwd').mkdir()
    refused = subprocess.run([sys.executable, '-c', "import socket; socket.create_connection(('127.0.0.1', 9))"], env=env, capture_output=True, text=True)
    assert 'network is off' in refused.stderr
    done = agft('train', '--method', 'TeCoA', '--steps', '2', '--out', 'run', cwd=tmp_path/'cwd', env=env)
    assert done.returncode == 0, done.stderr
    assert (tmp_path/'cwd'/'run'/'model.safetensors').exists()


@pytest.mark.parametrize('args, words', [
    (['train', '--method', 'AGTF', '--out', 'OUT'], ['AGTF', 'TeCoA, AGFT, PMG-AFT']),
    (['train', '--method', 'AGFT', '--out', 'OUT', '--preset', 'huge'], ['huge', 'tiny']),
    (['train', '--method', 'AGFT', '--out', 'OUT', '--lr', '-1'], ['-1', 'above 0']),
    (['train', '--method', 'AGFT', '--out', 'OUT', '--steps', '-5'], ['-5', '1 or more']),
    (['train', '--method', 'AGFT', '--out', 'OUT', '--device', 'tpu'], ['tpu', 'cpu']),
    (['train', '--method', 'AGFT', '--out', 'FILE'], ['is a file']),
    (['train', '--method', 'AGFT', '--out', 'OTHER'], ['run.json']),
    (['train', '--method', 'AGFT', '--out', 'FILE/below'], ['cannot be written']),
    (['train', '--method', 'AGFT', '--preset', 'photo', '--out', 'OTHER'], ['run.json']),
    (['train', '--method', 'AGFT', '--preset', 'photo', '--out', 'OUT'], ['AGFT_DATA']),
    (['demo', '--out', 'OUT', '--seeds', '0'], ['0', '1 or more']),
    (['eval', 'agft-tiny', '--out', 'OUT', '--eps', '4'], ["'4'", '4/255']),
    (['eval', 'agft-tiny', '--out', 'OUT', '--eps', 'four'], ['four', '4/255']),
    (['eval', 'agft-tiny', '--out', 'OUT', '--eps', '1/255,9'], ["'9'", '4/255']),
    (['eval', 'agft-tiny', '--out', 'OUT', '--threats', 'pgd20,aa'], ["'aa'", 'autoattack']),
    (['eval', 'agft-tiny', '--out', 'OUT', '--norm', 'L1'], ["'L1'", 'Linf, L2']),
    (['eval', 'agft-tiny', '--out', 'OUT', '--norm', 'L2', '--threats', 'mifgsm'], ['mifgsm', 'L2', 'Linf']),
    (['audit', 'agft-tiny', '--out', 'OUT', '--eps', '0'], ['0', 'above 0']),
    (['audit', 'agft-tiny', '--out', 'OUT', '--n', '-3'], ['-3', '1 or more']),
    (['eval', 'agft-tiny', '--out', 'OUT', '--n', '0'], ['0', '1 or more']),
    (['eval', 'missing.safetensors', '--out', 'OUT'], ['missing.safetensors', 'does not exist']),
    (['eval', 'CUT', '--out', 'OUT'], ['cut.safetensors', 'truncated']),
    (['eval', 'ALIEN', '--out', 'OUT'], ['alien.safetensors', 'agft-photo']),
    (['eval', 'agft-huge', '--out', 'OUT'], ['agft-huge', 'agft-tiny']),
    (['eval', 'agft-photo', '--preset', 'photo', '--out', 'OUT'], ['AGFT_DATA']),
    (['pretrain', '--preset', 'huge', '--out', 'OUT'], ['huge', 'tiny']),
])
def test_bad_input_is_one_line_and_exit_code_2(args, words, tmp_path, capsys, monkeypatch):
    from agft.clip import asset, save_clip
    (tmp_path/'file').write_text(''); (tmp_path/'other').mkdir(); (tmp_path/'other'/'thesis.tex').write_text('')
    (tmp_path/'cut.safetensors').write_bytes(asset('agft-tiny.safetensors').read_bytes()[:9999])
    if 'ALIEN' in args:                                    # a tiny model that says it is the photo architecture
        tiny = load_clip('agft-tiny'); tiny.name = 'agft-photo'; save_clip(tiny, tmp_path/'alien.safetensors')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('AGFT_DATA', str(tmp_path/'nowhere'))
    began = time.time()
    paths = {'OUT': 'out', 'FILE': 'file', 'FILE/below': 'file/below', 'OTHER': 'other', 'CUT': 'cut.safetensors', 'ALIEN': 'alien.safetensors'}
    assert main([paths.get(a, a) for a in args]) == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and 'Traceback' not in err and all(w in err for w in words), err
    assert time.time() - began < 20 and not (tmp_path/'out'/'model.safetensors').exists()


def test_a_folder_of_another_run_is_refused(small_preset, tmp_path, capsys):
    assert main(['demo', '--out', str(tmp_path/'d')]) == 0
    assert main(['demo', '--out', str(tmp_path/'d'), '--seeds', '2']) == 2
    assert 'seeds' in capsys.readouterr().err


def test_flags_of_another_model_are_not_taken_for_this_one(small_preset, tmp_path, capsys):
    "A checkpoint that was trained anew under the same path is another model."
    from agft.clip import save_clip
    model = load_clip('agft-tiny')
    save_clip(model, tmp_path/'m.safetensors')
    args = ['eval', str(tmp_path/'m.safetensors'), '--n', '8', '--out', str(tmp_path/'e')]
    assert main(args) == 0 and main(args) == 0
    next(model.model.visual.parameters()).mul_(1.5)
    save_clip(model, tmp_path/'m.safetensors')
    assert main(args) == 2 and 'model' in capsys.readouterr().err
