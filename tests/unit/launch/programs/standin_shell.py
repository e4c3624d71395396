"""Does what pdsh, mpirun or srun does, with this machine for every host.

``standin_shell.py pdsh|mpirun|srun ARGUMENTS…``.  Every "host" is a session of its own, so
that nothing here reaches its processes but what the real program would pass on.
"""

import os
import signal
import subprocess
import sys
import threading
import time

KIND, ARGUMENTS = sys.argv[1], sys.argv[2:]
UNREACHABLE = "nowhere"
DISTANT = {"PATH": "/usr/bin:/bin", "HOME": os.environ.get("HOME", "/")}


def pump(source, target):
    while data := os.read(source, 65536):
        os.write(target, data)


def spawn(command, environment, number, stdin):
    child = subprocess.Popen(
        command,
        env=environment,
        cwd="/" if KIND == "pdsh" else None,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    for source, target in ((child.stdout, 1), (child.stderr, 2)):
        thread = threading.Thread(target=pump, args=(source.fileno(), target), daemon=True)
        thread.start()
        child.pumps = [*getattr(child, "pumps", []), thread]
    return child


def pdsh():
    """Its standard input goes nowhere, but is closed on the hosts when it ends."""
    hosts = ARGUMENTS[ARGUMENTS.index("-w") + 1].split(",")
    for number, host in enumerate(hosts):
        text = ARGUMENTS[-1].replace("%%", "\0").replace("%n", str(number)).replace("\0", "%")
        if host == UNREACHABLE:
            text = f"echo 'ssh: Could not resolve hostname {host}' >&2; exit 255"
        yield host, spawn(["sh", "-c", text], DISTANT, number, subprocess.PIPE)


def mpirun():
    hosts = ARGUMENTS[ARGUMENTS.index("--host") + 1].split(",")
    names = [ARGUMENTS[i + 1] for i, word in enumerate(ARGUMENTS) if word == "-x"]
    command = ARGUMENTS[ARGUMENTS.index(sys.executable) :]
    os.chdir(ARGUMENTS[ARGUMENTS.index("--wdir") + 1])
    for number, host in enumerate(hosts):
        environment = {**DISTANT, **{name: os.environ[name] for name in names}}
        environment["OMPI_COMM_WORLD_RANK"] = str(number)
        yield host, spawn(command, environment, number, subprocess.DEVNULL)


def srun():
    command = ARGUMENTS[ARGUMENTS.index(sys.executable) :]
    count = int(next(w for w in ARGUMENTS if w.startswith("--ntasks=")).partition("=")[2])
    os.chdir(next(w for w in ARGUMENTS if w.startswith("--chdir=")).partition("=")[2])
    for number in range(count):
        environment = {**os.environ, "SLURM_PROCID": str(number)}
        yield f"node{number}", spawn(command, environment, number, subprocess.DEVNULL)


children = dict({"pdsh": pdsh, "mpirun": mpirun, "srun": srun}[KIND]())


def end_all(code):
    for signum in (signal.SIGTERM, signal.SIGKILL):
        for child in children.values():
            if child.poll() is None:
                child.send_signal(signum)
        time.sleep(0.3)
    os._exit(code)


if KIND != "pdsh":
    signal.signal(signal.SIGUSR1, lambda *_: [c.send_signal(10) for c in children.values()])
    signal.signal(signal.SIGTERM, lambda *_: end_all(143))
reported = set()
while len(reported) < len(children):
    for host, child in children.items():
        if host not in reported and child.poll() is not None:
            reported.add(host)
            for thread in child.pumps:
                thread.join(timeout=1)
            if child.returncode and KIND == "pdsh":
                code = child.returncode if child.returncode > 0 else 255
                text = f"pdsh@here: {host}: ssh exited with exit code {code}\n"
                os.write(2, text.encode())
            elif child.returncode:
                os.write(2, f"{KIND}: chatter: {host} failed\n".encode())
                end_all(child.returncode)
    time.sleep(0.02)
sys.exit(max(abs(child.returncode) for child in children.values()) if KIND == "pdsh" else 0)
