"""The verbs on completions and presets of a store. As in `commands.py`, imports stand in the functions."""

from __future__ import annotations

import argparse
import json

from flows.cli.commands import workspace_of
from qrpo_core.common.errors import QRPOError


def browse(options: argparse.Namespace) -> int:
    from qrpo_core.inspection.browse import Choice, Span, browse, browse_lines

    if options.limit < 1:
        raise QRPOError(f"--limit {options.limit} shows nothing", remedy="1 or more")
    choice = Choice(
        options.source,
        options.status,
        Span.parse(options.reward, "--reward"),
        Span.parse(options.quantile, "--quantile"),
        options.search,
    )
    workspace = workspace_of(options)
    found = browse(workspace, choice, order=options.order, limit=options.limit)
    if options.json:
        for row in found.rows:
            print(json.dumps(row, ensure_ascii=False, allow_nan=False))
    else:
        print("\n".join(browse_lines(found, full=options.full, experiment=options.experiment)))
    return 0


def push(options: argparse.Namespace) -> int:
    from qrpo_core.inspection.push import check_repo, hub, prepare, push, uploaded_lines, write

    workspace = workspace_of(options)
    if options.repo is None:
        upload = prepare(workspace, options.to.name, options.license, options.base_model)
        print("\n".join(uploaded_lines(upload, str(write(upload, options.to)))))
        print(f"Upload it: hf upload OWNER/NAME {options.to}")
        return 0
    check_repo(options.repo)
    api = hub()
    upload = prepare(workspace, options.repo, options.license, options.base_model)
    page = push(api, upload, options.repo, public=options.public)
    print("\n".join(uploaded_lines(upload, page)))
    return 0


def export(options: argparse.Namespace) -> int:
    from qrpo_core.inspection.data_set import export

    workspace = workspace_of(options)
    print("\n".join(export(workspace, options.out).lines()))
    return 0


def preset(options: argparse.Namespace) -> int:
    from flows.cli.preset import preset

    return preset(options)
