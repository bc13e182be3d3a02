"""What training takes of memory."""

from revseg.memory.batch import find_batch_size as find_batch_size
from revseg.memory.fit import fit as fit
from revseg.memory.measure import peak_bytes as peak_bytes
from revseg.memory.measure import saved_bytes as saved_bytes
from revseg.memory.plan import Plan as Plan
from revseg.memory.predict import predict as predict
from revseg.memory.predict import predicted_peak_bytes as predicted_peak_bytes
from revseg.memory.prediction import Prediction as Prediction
from revseg.memory.values import UnpredictableError as UnpredictableError
