"""The command line `layerskip`: one file per command. Nothing here imports torch before a command needs it."""

from __future__ import annotations

import click

from layerskip_kernels import __version__
from layerskip_kernels.cli.benchmark import benchmark
from layerskip_kernels.cli.correctness import correctness
from layerskip_kernels.cli.doctor import doctor
from layerskip_kernels.cli.errors import INTERRUPTED
from layerskip_kernels.cli.eval import evaluate
from layerskip_kernels.cli.generate import generate
from layerskip_kernels.cli.inspect import inspect
from layerskip_kernels.cli.sweep import sweep
from layerskip_kernels.cli.train import train
from layerskip_kernels.cli.tune import tune


class Commands(click.Group):
    def resolve_command(self, ctx: click.Context, args: list[str]):
        if not args[0].startswith("-") and args[0] not in self.commands:
            raise click.UsageError(f"No such command {args[0]!r}, choose from {', '.join(sorted(self.commands))}.", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context):
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("layerskip: interrupted", err=True)
            ctx.exit(INTERRUPTED)


@click.group(cls=Commands, help="LayerSkip self-speculative decoding on fused kernels.")
@click.version_option(__version__, message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Show where in the code an error was raised.")
def app(debug: bool) -> None:
    pass


app.add_command(generate)
app.add_command(train)
app.add_command(benchmark)
app.add_command(sweep)
app.add_command(tune)
app.add_command(evaluate)
app.add_command(inspect)
app.add_command(correctness)
app.add_command(doctor)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line on `argv` (None: the process's own) and exits the process with its exit code."""
    app.main(args=argv, prog_name="layerskip")
