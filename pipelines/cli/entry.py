"""Where the `raydit` command begins: signals are handled from here on, also while its modules are imported."""

from cluster import signals


def main() -> None:
    """Import the command line and run it. Exit codes: see pipelines.cli.main.main."""
    with signals.handle_signals(exit_at_once=True):
        try:
            with signals.defer_signals():
                from pipelines.cli.main import main as run
            run()
        except KeyboardInterrupt:  # at the end of the import, and not in what `run` handles itself
            from pipelines.cli.main import exit_interrupted

            exit_interrupted()
