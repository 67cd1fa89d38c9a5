# Build the wheel where there is a compiler, run it where there is none.
FROM python:3.13-slim-trixie AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev cmake ninja-build \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY csrc csrc
COPY viommud viommud
RUN pip wheel --no-cache-dir --wheel-dir /wheels .

FROM python:3.13-slim-trixie
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir --no-index --find-links /wheels viommud \
    && rm -rf /wheels \
    && useradd --system --no-create-home --shell /usr/sbin/nologin viommud \
    && install -d -o viommud -g viommud -m 0750 /run/viommud
USER viommud
# QEMU reaches the socket through a volume on /run/viommud; its user must be in the socket's group. The container
# ends with the VM.
VOLUME /run/viommud
ENTRYPOINT ["viommud"]
CMD ["--socket-path", "/run/viommud/vm.sock", "--socket-mode", "660"]
