"""The exporter's one error: a source, a plan or a result that an operator must mend."""

from sardonyx.errors import ConfigError


class ExportError(ConfigError):
    """The source cannot be exported, or what came out of it may not be published.

    Raised with the file and field at fault where there is one; the message says what would be right.
    """
