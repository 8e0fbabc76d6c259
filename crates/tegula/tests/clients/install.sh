#!/usr/bin/env bash
# Puts the clients that the tests want into target/clients (or TEGULA_CLIENTS), from their public
# registries. What can't be had is said and left out; the tests then list it as ignored.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../../.."
clients=${TEGULA_CLIENTS:-target/clients}
mkdir -p "$clients"

say() { printf 'clients: %s\n' "$*" >&2; }
limited() { timeout --kill-after=10 "$@"; }

if [ ! -x "$clients/py/bin/python" ] || ! "$clients/py/bin/python" -c 'import openai' 2>/dev/null; then
    { python3 -m venv "$clients/py" && limited 120 "$clients/py/bin/pip" install --quiet 'openai>=2,<4'; } ||
        say 'no openai for Python: needs python3 with venv, and PyPI'
fi
if [ ! -d "$clients/node_modules/openai" ] || [ ! -d "$clients/node_modules/playwright-core" ]; then
    [ -f "$clients/package.json" ] || echo '{"private": true}' >"$clients/package.json"
    limited 120 npm install --prefix "$clients" --silent --no-fund --no-audit openai playwright-core ||
        say 'no openai and playwright-core for JavaScript: needs npm'
fi
if ! command -v chromium >/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        { limited 60 apt-get update -qq &&
            DEBIAN_FRONTEND=noninteractive limited 180 apt-get install -y -qq chromium; } >/dev/null 2>&1 ||
            say 'no chromium: apt-get could not install it'
    else
        say 'no chromium: install it (Debian: apt-get install chromium)'
    fi
fi
exit 0
