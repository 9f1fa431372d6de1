# SPDX-License-Identifier: Apache-2.0
"""Logging: JSON for machines, a console form for people, to standard error."""

import logging
import sys
from typing import Literal

import structlog

LogFormat = Literal["json", "console"]


def configure(form: LogFormat, level: str) -> None:
    """Configure structlog once, for this process."""
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if form == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
