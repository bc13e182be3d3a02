# docker build -t revseg . && docker run --gpus all -v "$PWD:/work" revseg train --data synthetic --out runs/first
FROM python:3.12-slim
WORKDIR /opt/revseg
COPY pyproject.toml setup.py constraints.txt MANIFEST.in README.md LICENSE ./
COPY revseg revseg
COPY kernels kernels
RUN python -m pip install --no-cache-dir --constraint constraints.txt ".[train,triton,fast]"
WORKDIR /work
ENTRYPOINT ["revseg"]
CMD ["--help"]
