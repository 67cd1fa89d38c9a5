# shellcheck shell=sh
# The virtual environment in .venv with viommud and the tools; to be sourced after system.sh.
: "${root:?}"

# python_is_good PYTHON: new enough, can make virtual environments, and has its headers?
python_is_good() {
    "$1" - >/dev/null 2>&1 <<'END'
import ensurepip, pathlib, sys, sysconfig, venv
assert sys.version_info >= (3, 11)
assert (pathlib.Path(sysconfig.get_path("include")) / "Python.h").exists()
END
}

# Prints a Python to build with; installs Debian's where there is none.
find_python() {
    for candidate in python3 /usr/bin/python3; do
        if python_is_good "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    install_packages python3 python3-venv python3-dev
    python_is_good /usr/bin/python3 || die "Python 3.11 or later is needed; Debian has it from release 12 on"
    echo /usr/bin/python3
}

# sources_digest FILE...: one line that changes when one of the files does.
sources_digest() {
    cat "$@" | sha256sum | cut -d ' ' -f 1
}

# .venv with viommud as it is in the sources, the tools of the group "dev", and what builds the package.
make_environment() {
    venv=$root/.venv
    need gcc gcc
    need_file /usr/include/stdio.h libc6-dev
    install_wanted
    if [ ! -x "$venv/bin/python" ]; then
        python=$(find_python)
        say "making a virtual environment with $("$python" -V)"
        "$python" -m venv "$venv"
    fi
    tools=$(sources_digest "$root/pyproject.toml")
    if [ "$(cat "$venv/.tools" 2>/dev/null)" != "$tools" ]; then
        say "installing tools and libraries of Python"
        run_quietly "$venv/bin/python" -m pip install -q --upgrade "pip>=25.1"
        # shellcheck disable=SC2046  # one word for each requirement
        run_quietly "$venv/bin/python" -m pip install -q --group "$root/pyproject.toml:dev" \
            cmake ninja $(requirements)
        echo "$tools" >"$venv/.tools"
    fi
    built=$(sources_digest "$root"/pyproject.toml "$root"/csrc/CMakeLists.txt "$root"/csrc/*.[ch])
    if [ "$(cat "$venv/.built" 2>/dev/null)" != "$built" ]; then
        say "building viommud"
        run_quietly "$venv/bin/python" -m pip install -q --no-build-isolation --no-deps --editable "$root"
        echo "$built" >"$venv/.built"
    fi
}

# What building and running viommud takes, without spaces.
requirements() {
    "$venv/bin/python" - "$root/pyproject.toml" <<'END'
import sys, tomllib
project = tomllib.load(open(sys.argv[1], "rb"))
for wanted in project["build-system"]["requires"] + project["project"]["dependencies"]:
    print(wanted.replace(" ", ""))
END
}

# run_quietly COMMAND...: its output only where it fails.
run_quietly() {
    mkdir -p "$root/build"
    "$@" >"$root/build/setup.log" 2>&1 || {
        cat "$root/build/setup.log" >&2
        die "failed: $*"
    }
}
