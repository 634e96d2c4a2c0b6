"""``spafit cache``: list, verify and prune the stored activations."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

cache_app = typer.Typer(help="Look after the cache of activations.", no_args_is_help=True, rich_markup_mode="markdown")

_CacheDir = Annotated[
    Path | None, typer.Option("--cache-dir", help="The cache. Default: $SPAFIT_CACHE or the user's cache folder.")
]


@cache_app.command("list")
def list_cache(
    cache_dir: _CacheDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """List what is stored, least recently used first, with the total and the size limit.

    Example: `spafit cache list`
    """
    import json

    from probing.cache import cache_limit, cache_root, entries

    found = entries(cache_dir)
    total = sum(e.bytes for e in found)
    if as_json:
        stores = [
            {
                "address": e.folder.name,
                "bytes": e.bytes,
                "finished_shards": e.finished,
                "last_used": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(e.last_used)),
                **{k: v for k, v in e.facts.items() if k != "bytes"},
            }
            for e in found
        ]
        content = {"folder": str(cache_root(cache_dir)), "bytes": total, "limit": cache_limit(), "stores": stores}
        typer.echo(json.dumps(content, indent=1, ensure_ascii=False))
        return
    for entry in found:
        facts = entry.facts
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.last_used))
        typer.echo(
            f"{entry.folder.name[:12]}  {_size(entry.bytes):>9}  {entry.finished}/{entry.shards} shards  {used}  "
            f"{facts.get('model', '(unreadable)')}  {facts.get('texts', '?')} texts  "
            f"{', '.join(facts.get('series', []))}  {facts.get('dtype', '')}"
        )
    typer.echo(f"{len(found)} store(s), {_size(total)} of {_size(cache_limit())} in {cache_root(cache_dir)}")


@cache_app.command()
def verify(
    cache_dir: _CacheDir = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Drop damaged shards, so that the next run computes them again.")
    ] = False,
) -> None:
    """Read every byte back and compare with the checksums; exit status 1 if anything is damaged.

    A run does the same for the shards that it reads, and recomputes damaged ones by itself.

    Example: `spafit cache verify --repair`
    """
    from probing.cache import damaged_shards, entries
    from probing.store import data_path, manifest_path

    damaged = checked = 0
    for entry in entries(cache_dir):
        checked += entry.finished
        for shard in damaged_shards(entry):
            damaged += 1
            typer.echo(f"damaged: {data_path(entry.folder, shard)}")
            if repair:
                manifest_path(entry.folder, shard).unlink(missing_ok=True)
    dropped = " and dropped" if repair and damaged else ""
    typer.echo(f"{checked} shard(s) read, {damaged} damaged{dropped}")
    if damaged:
        raise typer.Exit(1)


@cache_app.command()
def prune(
    cache_dir: _CacheDir = None,
    limit: Annotated[
        str | None,
        typer.Option("--limit", help="Size that may stay, such as 10GB; 0 empties it. Default: $SPAFIT_CACHE_LIMIT."),
    ] = None,
    unused_days: Annotated[
        float | None, typer.Option("--unused-days", min=0, help="Also delete what was not used for so many days.")
    ] = None,
) -> None:
    """Delete the least recently used stores until the cache is within its size limit.

    Stores that a running process uses are passed by.

    Example: `spafit cache prune --limit 10GB`
    """
    from probing.cache import cache_limit, entries, parse_size
    from probing.cache import prune as prune_stores

    wanted = cache_limit() if limit is None else parse_size(limit)
    gone = prune_stores(cache_dir, limit=wanted, unused_days=unused_days)
    for entry in gone:
        typer.echo(f"deleted {entry.folder.name[:12]}  {_size(entry.bytes)}  {entry.facts.get('model', '')}")
    left = sum(e.bytes for e in entries(cache_dir))
    typer.echo(f"{len(gone)} store(s) deleted, {_size(left)} left")
    if left > wanted:
        typer.echo(f"The rest is in use, so the cache stays above {_size(wanted)}.", err=True)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
