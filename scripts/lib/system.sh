# shellcheck shell=sh
# Debian packages for the scripts beside this directory; to be sourced.
#
# Takes $root, the repository, and $script, the name in front of messages.
: "${root:?}" "${script:?}"

say() {
    echo "$script: $*" >&2
}

die() {
    say "$@"
    exit 1
}

# install_packages PACKAGE...: with apt, as root or through sudo; quiet unless it fails.
install_packages() {
    command -v apt-get >/dev/null || die "this needs apt, or these Debian packages in another way: $*"
    as_root=
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null || die "run this as root, or install sudo, or install these packages: $*"
        as_root=sudo
    fi
    say "installing $*"
    mkdir -p "$root/build"
    if ! {
        $as_root apt-get -q update &&
            $as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -y --no-install-recommends install "$@"
    } >"$root/build/apt.log" 2>&1; then
        tail -n 20 "$root/build/apt.log" >&2
        die "apt-get failed; all it said is in build/apt.log"
    fi
}

# need COMMAND PACKAGE...: the packages are wanted where the command is missing.  install_wanted installs them.
wanted_packages=
need() {
    if ! command -v "$1" >/dev/null; then
        shift
        wanted_packages="$wanted_packages $*"
    fi
}

# need_file PATH PACKAGE...: likewise for a file.
need_file() {
    if [ ! -e "$1" ]; then
        shift
        wanted_packages="$wanted_packages $*"
    fi
}

install_wanted() {
    # shellcheck disable=SC2086  # one word for each package
    [ -z "$wanted_packages" ] || install_packages $wanted_packages
    wanted_packages=
}
