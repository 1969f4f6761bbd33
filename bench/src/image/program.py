# Lays out, at argv[1], this machine's Python with what the bench's program reads and nothing else; prints the
# interpreter's path. Every file lies where it lies on the machine, with its times, or compiled modules would be stale.
import os, shutil, subprocess, sys

exec(sys.argv[2].replace("print(", "str("))

root, taken = sys.argv[1], set()


def take(path):
    if path in taken or not os.path.isfile(path):
        return
    taken.add(path)
    to = root + path
    os.makedirs(os.path.dirname(to), exist_ok=True)
    shutil.copy2(path, to)
    if path.endswith(".so") or ".so." in path or os.access(path, os.X_OK):
        told = subprocess.run(["ldd", path], capture_output=True, text=True).stdout
        for word in told.split():
            if word.startswith("/"):
                take(word)


executable = os.path.realpath(sys.executable)
take(executable)
for module in list(sys.modules.values()):
    for path in (getattr(module, "__file__", None), getattr(module, "__cached__", None)):
        if path:
            take(os.path.abspath(path))
os.makedirs(os.path.join(root + sys.prefix, "lib", "python%d.%d" % sys.version_info[:2], "lib-dynload"), exist_ok=True)
print(executable)
