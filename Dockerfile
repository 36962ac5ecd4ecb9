# syntax=docker/dockerfile:1
#
#   docker build -t athanor .
#   docker run --gpus all --shm-size 16g -p 7860:7860 \
#     -v /srv/models:/models -v athanor-data:/data -v athanor-saves:/saves -v athanor-config:/config athanor
#
# First add a user (docs/deployment.md): on addresses other than localhost, the studio requires --auth or --no-auth.

# PyTorch's wheels contain the CUDA libraries; the image adds what the driver needs, and refuses to start with a clear
# message if the driver is too old. Keep it at the CUDA version of the torch in requirements.txt.
ARG CUDA=13.0.1-base-ubuntu24.04
FROM nvidia/cuda:${CUDA}

# tini: runs are detached from the web server, so something has to reap them when they end.
# gcc and the Python headers: Triton compiles the launcher of each kernel on first use.
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3.12 python3.12-venv python3.12-dev gcc libc6-dev tini \
    && rm -rf /var/lib/apt/lists/*

# Most users' files have the id 1000, which bind mounts need; in Ubuntu's image it is already in use.
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

# Before the sources, so that a change in them does not download gigabytes again.
COPY requirements.txt /tmp/requirements.txt
RUN python3.12 -m venv /opt/venv && pip install --no-cache-dir -r /tmp/requirements.txt

WORKDIR /app
COPY . .
# A new named volume starts with the image's content at its path: the sample data sets. The demo model is created in
# the project's own data folder.
RUN cp -r data/. /data/ && chown -R athanor: /data data

USER athanor
VOLUME ["/models", "/data", "/saves", "/config"]
EXPOSE 7860
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:7860/healthz', timeout=4)"]

ENTRYPOINT ["tini", "--"]
CMD ["python", "app.py", "--host", "0.0.0.0", "--port", "7860", "--auth", "/config/users.txt"]
