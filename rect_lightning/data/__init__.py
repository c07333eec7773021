"""Edit requests, where they are read from, and the data module that hands them to an editor."""

from rect_lightning.data.datamodule import EditData
from rect_lightning.data.readers import read_requests
from rect_lightning.data.request import EditRequest, Neighbour, RequestError

__all__ = ["EditData", "EditRequest", "Neighbour", "RequestError", "read_requests"]
