# The service without torch, from the repository:
#   docker build -f docs/operations/service.Dockerfile -t leapfrog .
#   docker run -p 3000:3000 -e LEAPFROG_API_KEYS=KEY -v leapfrog-data:/data leapfrog
FROM python:3.11-slim AS build
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY distill distill
COPY service service
COPY eval eval
COPY benchmarks benchmarks
RUN python -m venv /opt/leapfrog \
    && /opt/leapfrog/bin/pip install --no-cache-dir --constraint constraints.txt '.[serve,tracing]'

FROM python:3.11-slim
RUN useradd --uid 1034 --create-home leapfrog && mkdir /data && chown leapfrog /data
COPY --from=build /opt/leapfrog /opt/leapfrog
COPY bundles /srv/bundles
COPY bentofile.yaml /srv/
ENV PATH=/opt/leapfrog/bin:$PATH \
    BENTOML_DO_NOT_TRACK=True \
    BENTOML_HOME=/tmp/bentoml \
    LEAPFROG_BUNDLES=/srv/bundles \
    LEAPFROG_DATA=/data
USER leapfrog
WORKDIR /srv
VOLUME /data
EXPOSE 3000
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:3000/readyz')"]
# What the service is lies in /srv/bentofile.yaml. A bento's image takes the same arguments.
ENTRYPOINT ["bentoml"]
CMD ["serve", "--host", "0.0.0.0", "--port", "3000"]
