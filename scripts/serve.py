"""Start transformers' OpenAI-compatible server with continuous batching over triton_paged_flash2.

    pip install 'transformers[serving]'
    python scripts/serve.py MODEL --port 8000

The server is the one of `transformers serve`. That command takes only the attention implementations
on a list of its own, so it is started here without one, and its model manager is given the name
before it loads anything. (`Serve._model_manager` is not promised by transformers; seen in 5.17 to
5.24.) See docs/serving.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

IMPLEMENTATION = "triton_paged_flash2"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("model", help="a folder or a name on the hub; every request is answered by it")
    add("--host", default="localhost", help="address to listen on (localhost)")
    add("--port", type=int, default=8000, help="port to listen on (8000)")
    add("--device", default="auto", help="such as cpu or cuda:0 (auto)")
    add("--dtype", default="auto", help="such as bfloat16 (auto: the checkpoint's)")
    add("--page-size", type=int, default=64, help="tokens of a page, a multiple of 16 (64)")
    add("--pages", type=int, help="pages in the pool (what memory allows)")
    add("--max-batch-tokens", type=int, help="tokens of one pass at most (transformers' choice)")
    add("--max-memory-percent", type=float, help="share of the memory to use, 0 to 1")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    if args.page_size < 16 or args.page_size % 16:
        print(f"error: --page-size {args.page_size} is not a multiple of 16", file=sys.stderr)
        return 2
    import hf_attn_patch  # noqa: F401  (registers the implementations)
    from hf_attn_converters.precision import slow_note

    try:
        from transformers.cli.serve import Serve

        server = Serve(
            continuous_batching=True,
            device=args.device,
            dtype=args.dtype,
            model_timeout=-1,  # never unloaded
            host=args.host,
            port=args.port,
            cb_block_size=args.page_size,
            cb_num_blocks=args.pages,
            cb_max_batch_tokens=args.max_batch_tokens,
            cb_max_memory_percent=args.max_memory_percent,
            non_blocking=True,
        )
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    try:
        manager = server._model_manager
        manager.attn_implementation = IMPLEMENTATION
        manager.force_model = args.model
        model, _ = manager.load_model_and_processor(manager.process_model_name(args.model))
        found = model.config._attn_implementation
        if found != IMPLEMENTATION:
            raise ValueError(
                f"transformers has given {type(model).__name__} {found!r}, not {IMPLEMENTATION!r}"
            )
        if note := slow_note(model.dtype, model.device, "serve it with --dtype float32"):
            print(f"warning: {note}", file=sys.stderr, flush=True)
        url = f"http://{args.host}:{args.port}/v1"
        print(f"{args.model} is served with {found} at {url}", flush=True)
        server._thread.join()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    finally:
        server.kill_server()
    return 0


if __name__ == "__main__":
    sys.exit(main())
