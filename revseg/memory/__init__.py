"""What training takes of memory."""

from revseg.memory.measure import peak_bytes as peak_bytes
from revseg.memory.measure import saved_bytes as saved_bytes
