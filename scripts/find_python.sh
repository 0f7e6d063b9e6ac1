# Sourced by the set-up scripts: puts a Python 3.11, 3.12 or 3.13 into $python.
python=${PYTHON:-}
if [ -z "$python" ]; then
    for candidate in python3.11 python3.12 python3.13 python3; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
fi
[ -n "$python" ] || { echo "setup: Python 3.11, 3.12 or 3.13 is needed; set PYTHON to one" >&2; exit 1; }
