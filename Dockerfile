# syntax=docker/dockerfile:1
#
#   docker build -t athanor .
#   docker run --gpus all --shm-size 16g -p 7860:7860 \
#     -v /srv/models:/models -v athanor-data:/data -v athanor-saves:/saves -v athanor-config:/config athanor
#
# First add a user (docs/deployment.md): beyond localhost the studio wants --auth FILE, or --no-auth said openly.

# PyTorch's wheels bring CUDA's libraries; the image adds what the driver needs, and refuses too old a driver at
# the start with a clear message. Keep it at the CUDA version of the torch in requirements.txt.
ARG CUDA=13.0.1-base-ubuntu24.04
FROM nvidia/cuda:${CUDA}

# tini: runs are detached from the web server, so somebody must collect them when they end.
# gcc and Python's headers: Triton compiles the starter of each kernel on first use.
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3.12 python3.12-venv python3.12-dev gcc libc6-dev tini \
    && rm -rf /var/lib/apt/lists/*

# The id 1000 is what most people's own files have, which is what bind mounts need; Ubuntu's image gave it away.
RUN userdel --remove ubuntu \
    && useradd --uid 1000 --create-home athanor \
    && mkdir /models /data /saves /config \
    && chown athanor: /models /data /saves /config

ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONUTF8=1 \
    HF_HOME=/models/.huggingface \
    MODELSCOPE_CACHE=/models/.modelscope \
    ATHANOR_MODELS=/models \
    ATHANOR_DATA=/data \
    ATHANOR_SAVES=/saves \
    ATHANOR_AUTH=/config/users.txt

# Before the sources, so that a change in them does not fetch gigabytes again.
COPY requirements.txt /tmp/requirements.txt
RUN python3.12 -m venv /opt/venv && pip install --no-cache-dir -r /tmp/requirements.txt

WORKDIR /app
COPY . .
# A new named volume starts with what the image has at its place: the sample data sets. The project's own data
# folder is where the demo model is made.
RUN cp -r data/. /data/ && chown -R athanor: /data data

USER athanor
VOLUME ["/models", "/data", "/saves", "/config"]
EXPOSE 7860
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:7860/healthz', timeout=4)"]

ENTRYPOINT ["tini", "--"]
CMD ["python", "app.py", "--host", "0.0.0.0", "--port", "7860", "--auth", "/config/users.txt"]
