"""Stores on object stores: in memory, and S3 as an emulator on this machine speaks it."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from opd_jax.errors import InputError
from opd_jax.rollout import RolloutStore, break_lock
from opd_jax.rollout.objects import ObjectPlace, _bucket
from opd_jax.rollout.scratch import Scratch, clear_work
from opd_jax.rollout.storage import LOCK
from tests.rollout.test_store import ABOUT, rollouts, same

pytest.importorskip("obstore", reason="object stores need opd_jax[objects]")


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """A bucket of an S3 emulator, reached as users reach S3: by what is in the environment."""
    pytest.importorskip("moto", reason="the S3 emulator needs opd_jax[emulator]")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    environment = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            for _ in range(300):
                try:
                    request = urllib.request.Request(f"{url}/rollouts", method="PUT")
                    urllib.request.urlopen(request, timeout=5).close()
                    break
                except OSError:
                    assert server.poll() is None
                    time.sleep(0.1)
            yield "s3://rollouts"
        finally:
            server.terminate()
            server.wait()
            _bucket.cache_clear()


@pytest.fixture(params=["memory", "s3"])
def url(request):
    root = request.getfixturevalue("s3") if request.param == "s3" else "memory://rollouts"
    return f"{root}/{request.node.name.replace('[', '-').replace(']', '')}"


def test_a_store_on_an_object_store(url):
    store = RolloutStore(url, ABOUT)
    assert store.rounds == store.pending(0) == []
    four = rollouts(0, hidden=True)
    store.append(four[:2], policy="p")
    store.close()
    again = RolloutStore(url, ABOUT)
    assert again.rounds == []
    same(again.pending(0, policy="p"), four[:2])
    again.append(four[2:], policy="p")
    again.seal(0, note="whole")
    again.verify()
    again.append(rollouts(7))  # which is visible here, and no stranger
    again.verify()
    again.discard(7)
    again.close()
    stray = f"round-00007/{again.shards[0]['file'].rpartition('/')[2]}"
    again.place.create(stray, again.place.read(again.shards[0]["file"])[0])
    with pytest.raises(InputError, match=f"{url}/{stray} is of another store or round"):
        again.verify()
    again.place.remove(stray)
    same(RolloutStore(url).read(0), four)
    assert RolloutStore(url).shard(0)["note"] == "whole"
    with pytest.raises(InputError, match="one student"):
        RolloutStore(url, {"student": "xyz"})
    store.append(rollouts(1))
    store.seal(1)
    assert again.rounds == [0, 1]


def test_damage_on_an_object_store_is_named(url):
    store = RolloutStore(url, ABOUT)
    for part in range(4):
        store.append(rollouts(0)[part : part + 1])
    store.close()
    torn = store.place.names("round-00000")[1]
    whole, version = store.place.read(torn)
    store.place.update(torn, whole[:50], version)
    with store:
        same(store.pending(0), [rollouts(0)[i] for i in (0, 2, 3)])
        store.append(rollouts(0)[1:2])
        store.seal(0)
    same(store.read(0), rollouts(0))
    [file] = [shard["file"] for shard in store.shard(0)["shards"] if shard["file"] == torn]
    data, version = store.place.read(file)
    store.place.update(file, data[:-1] + bytes([data[-1] ^ 1]), version)
    with pytest.raises(InputError, match=f"{url}/{file} has another SHA-256"):
        store.verify()
    store.place.remove(file)
    with pytest.raises(InputError, match=f"{url}/{file} is missing"):
        store.read(0)


def other_owner(store, **change):
    """The store's lock, as another process would hold it."""
    store.place.lock()
    held, version = store.place.read(LOCK)
    owner = {**json.loads(held), "token": "0123", **change}
    store.place.update(LOCK, json.dumps(owner).encode(), version)
    store.place.unlock()  # which takes away no lock but its own
    return owner


def test_one_writer_at_a_time_on_an_object_store(url):
    store, other = RolloutStore(url, ABOUT), RolloutStore(url, ABOUT)
    store.append(rollouts(0)[:2])
    with pytest.raises(InputError, match=f"held by process {os.getpid()} on "):
        other.append(rollouts(0))
    same(other.pending(0), rollouts(0)[:2])
    store.append(rollouts(0)[2:])
    store.seal(0)
    other_owner(store, host="elsewhere")
    with pytest.raises(InputError, match=rf"on elsewhere since .*break_lock\('{url}', '0123'\)"):
        other.append(rollouts(1))
    with pytest.raises(InputError, match="held by 0123, not 4567"):
        break_lock(url, "4567")
    break_lock(url, "0123")
    with pytest.raises(InputError, match="must be there to be broken"):
        break_lock(url, "0123")
    other.append(rollouts(1))
    other.close()
    # A process that was killed on this machine holds no lock; of another machine's nothing is known here.
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    other_owner(store, process=gone.pid, host="elsewhere")
    with pytest.raises(InputError, match=f"held by process {gone.pid} on elsewhere"):
        store.append(rollouts(2))
    break_lock(url, "0123")
    for number in (2**80, gone.pid):
        store.close()
        other_owner(store, process=number)
        store.append(rollouts(2))
    with pytest.raises(InputError, match="held by process"):
        other.append(rollouts(2))
    store.close()
    with pytest.raises(FileNotFoundError):
        store.place.read(LOCK)


def test_a_lock_of_another_users_process_is_held(monkeypatch):
    store = RolloutStore("memory://rollouts/others", ABOUT)
    other_owner(store)

    def forbidden(process, signal):
        raise PermissionError

    monkeypatch.setattr(os, "kill", forbidden)
    with pytest.raises(InputError, match=f"held by process {os.getpid()} on "):
        store.append(rollouts(0))


@pytest.mark.parametrize(
    "held", [b"", b"\xff", b"garbage", b'{"host": "a', b"[1]", b'{"host": "a"}', b"null", "process"]
)
def test_a_lock_that_does_not_say_who_holds_it_is_named_and_can_be_broken(held):
    url = "memory://rollouts/garbage"
    store = RolloutStore(url, ABOUT)
    if held == "process":
        other_owner(store, process="7")
    else:
        store.place.create(LOCK, held)
    with pytest.raises(InputError, match=rf"memory://.*/{LOCK} holds b.*break_lock\('{url}', '") as error:
        store.append(rollouts(0))
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="is held by .*, not 0123"):
        break_lock(url, "0123")
    break_lock(url, str(error.value).split("'")[-2])
    store.append(rollouts(0))
    store.discard(0)
    store.close()


def test_a_writer_whose_lock_was_broken_clobbers_nothing(url):
    slow, quick = RolloutStore(url, ABOUT), RolloutStore(url, ABOUT)
    slow.append(rollouts(0))
    manifest, version = slow._manifest.read()
    break_lock(url, json.loads(slow.place.read(LOCK)[0])["token"])
    quick.append(rollouts(1))
    quick.seal(1)
    manifest["rounds"] = []
    with pytest.raises(InputError, match=r"manifest\.json has changed since it was read"):
        slow._manifest.write(manifest, version)
    slow.seal(0)
    assert RolloutStore(url).rounds == [0, 1]
    with pytest.raises(FileExistsError):
        slow.place.create(slow.shard(0)["shards"][0]["file"], b"another")


def test_finished_pieces_lie_on_an_object_store_too(url):
    place = ObjectPlace(url)
    piece = {"reward": rollouts(0)[0].score.old_logprobs}
    Scratch(place, 3, {"k": 1}).keep("policy-00000", piece)
    [(name, arrays)] = Scratch(ObjectPlace(url), 3, {"k": 1}).found().items()
    assert name == "policy-00000"
    assert arrays["reward"].tobytes() == piece["reward"].tobytes()
    assert Scratch(place, 3, {"k": 2}).found() == Scratch(place, 4, {"k": 1}).found() == {}
    clear_work(place, 3)
    assert Scratch(place, 3, {"k": 1}).found() == {}


def test_an_object_store_that_is_not_there_or_does_not_answer_is_said(s3, monkeypatch):
    with pytest.raises(InputError, match="must be there: s3://nowhere/x has none") as error:
        RolloutStore("s3://nowhere/x", ABOUT).append(rollouts(0))
    assert "\n" not in str(error.value)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "false")  # and so it asks in a way that is not answered
    with pytest.raises(
        InputError, match=r"must answer and let us in: s3://silent/x/\.manifest\.json"
    ) as error:
        RolloutStore("s3://silent/x", ABOUT)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "url", "foo://x file:///tmp/x az://x/y http://x/y s3:// s3:///x s3:/x/y gs:// memory:// ://x/y".split()
)
def test_a_url_that_no_store_can_lie_at_is_refused(url):
    with pytest.raises(InputError, match=f"with a bucket: got '{url}'; name one of these"):
        RolloutStore(url)


def test_a_url_and_credentials_that_cannot_be_read_are_said(monkeypatch):
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere")
    for url, reason in (("gs://b/x", "/nowhere"), ("s3://b c/x", "invalid domain")):
        with pytest.raises(InputError, match=f"must answer and let us in: .*{reason}") as error:
            RolloutStore(url)
        assert "\n" not in str(error.value)


def test_a_store_that_does_not_put_on_a_condition_is_refused_by_its_lock(s3, monkeypatch):
    monkeypatch.setenv("AWS_CONDITIONAL_PUT", "disabled")
    _bucket.cache_clear()
    store = RolloutStore(f"{s3}/unconditional", ABOUT)
    with pytest.raises(InputError, match="must put on a condition.*conditional put is disabled") as error:
        store.append(rollouts(0))
    assert "\n" not in str(error.value)
    assert store.place.all_names() == []
    _bucket.cache_clear()


def test_what_reads_object_stores_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(
        InputError, match=r"not installed, and gs://b is one; pip install 'opd_jax\[objects\]'"
    ):
        RolloutStore("gs://b/x")


def test_nothing_of_it_is_loaded_for_a_folder():
    code = """if True:
        import sys
        from opd_jax.rollout import RolloutStore
        assert RolloutStore('/nowhere').rounds == []
        assert 'obstore' not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
