# docker build -t mae_jax .
# docker run --gpus all --shm-size 8g -v "$PWD":/work mae_jax train --config pretrain:vit_b16 --workdir runs/x
FROM python:3.12-slim
# The driver is the host's; jax's wheels contain the rest of CUDA.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY . /src
RUN pip install --no-cache-dir "/src[cuda12,demo,hub]"
WORKDIR /work
ENTRYPOINT ["mae-jax"]
